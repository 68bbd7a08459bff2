"""Layers as products of matrices: the weight as rows, and what each row is multiplied with."""

from typing import Any, NamedTuple, cast

import numpy as np
import onnx

from ...rounding import Array
from ..model.graph import Graph, to_array
from ..model.operators import attribute

MOST = 4096  # positions of an input over all data, or as many as a row has values
SEED = 0


class Rows(NamedTuple):
    """The weight of a layer as matrices."""

    values: Array
    """Shape (groups, outputs, inputs)."""
    shape: tuple[int, ...]
    """Of the weight."""
    transposed: bool
    """Whether the weight has its outputs in the last axis."""
    dtype: "np.dtype[np.generic]"

    @property
    def outputs(self) -> int:
        """Return the number of output channels."""
        groups, outputs = self.values.shape[:2]
        return int(groups * outputs)


def as_rows(graph: Graph, node: onnx.NodeProto) -> Rows:
    """Return the weight of a Conv, Gemm or MatMul."""
    weight = to_array(graph.initializers[node.input[1]])
    groups = cast(int, attribute(node, "group", 1)) if node.op_type == "Conv" else 1
    transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
    matrix = (weight.T if transposed else weight).reshape(groups, weight.shape[transposed] // groups, -1)
    return Rows(matrix.astype(np.float64), weight.shape, transposed, weight.dtype)


def from_rows(rows: Rows, values: Array) -> Array:
    """Return a weight from its matrices."""
    matrix = values.reshape(rows.outputs, -1)
    found: Array = (matrix.T if rows.transposed else matrix).reshape(rows.shape).astype(rows.dtype)
    return found


def sample_inputs(node: onnx.NodeProto, rows: Rows, x: Array, parts: int) -> Array:
    """Return what the rows of a layer are multiplied with at some positions, shape (groups, positions, inputs).

    All inputs of a layer come in so many parts. The positions are random, but always the same ones.
    """
    groups, _, inputs = rows.values.shape
    limit = -(-max(MOST, inputs) // parts)
    if node.op_type != "Conv":
        return some_rows(x.reshape(-1, inputs).astype(np.float64), limit)[None]
    windows = _windows(node, rows.shape[2:], x)
    spatial = len(rows.shape) - 2
    places = windows.shape[:1] + windows.shape[2 : 2 + spatial]
    chosen = np.unravel_index(_positions(int(np.prod(places)), limit), places)
    found = np.moveaxis(windows, 1, 1 + spatial)[chosen]  # (positions, channels, *kernel)
    return found.reshape(len(found), groups, inputs).transpose(1, 0, 2).astype(np.float64)


def some_rows(x: Array, limit: int) -> Array:
    """Return so many rows at most: random ones, but always the same."""
    return x[_positions(len(x), limit)]


def _positions(number: int, limit: int) -> Array:
    every = np.arange(number)
    return every if number <= limit else np.random.default_rng(SEED).choice(every, limit, replace=False)


def _windows(node: onnx.NodeProto, kernel: tuple[int, ...], x: Array) -> Array:
    """Return what the kernel of a convolution sees at each position: (samples, channels, *positions, *kernel)."""
    spatial = len(kernel)
    strides, dilations = (_integers(node, name, [1] * spatial) for name in ("strides", "dilations"))
    extents = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    pads = _pads(node, x.shape[2:], extents, strides)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:], strict=True)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, extents, axis=tuple(range(2, 2 + spatial)))
    steps: Any = tuple(slice(None, None, step) for step in (1, 1, *strides, *dilations))
    found: Array = windows[steps]
    return found


def _pads(node: onnx.NodeProto, sizes: tuple[int, ...], extents: list[int], strides: list[int]) -> list[int]:
    """Return how many zeros lie before and behind each axis."""
    kind = cast(bytes, attribute(node, "auto_pad", b"NOTSET")).decode()
    if not kind.startswith("SAME"):
        none = [0] * 2 * len(sizes)
        return none if kind == "VALID" else _integers(node, "pads", none)
    rows = zip(sizes, extents, strides, strict=True)
    whole = [max(0, (-(-size // step) - 1) * step + extent - size) for size, extent, step in rows]
    less, more = [one // 2 for one in whole], [one - one // 2 for one in whole]
    return [*less, *more] if kind == "SAME_UPPER" else [*more, *less]


def _integers(node: onnx.NodeProto, name: str, default: list[int]) -> list[int]:
    return list(cast(list[int], attribute(node, name, default)))
