"""What verification finds of each tensor, and which differences rounding explains."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..html_tables import html_table
from ..settings import Engine
from ..text import number
from .engines.quantizer_nodes import QUANTIZE, label
from .execution import Feed, Session
from .feeds import Array
from .model.graph import Graph

LEVELS = 1  # by which integers may differ: a float32 sum next to a tie may round the other way
RELATIVE = 2e-3  # of the largest value, by which floats may differ: kernels sum in another order
NOISE = 0.1  # of the root mean square, by which outputs of a whole run may differ: 20 dB
SILENT = 1e-3  # for the root mean square of outputs that are all 0, as where a LayerNormalization sees constants
NUDGED = 3  # or so many times what half a level at the input, or quantization itself, changes them
WHOLE_RUN = "the whole run"


class TensorCheck(NamedTuple):
    """One tensor of a quantized model, compared over all batches."""

    tensor: str
    node: str
    """What computes it; of an output that was compared over a whole run, `the whole run`."""
    op_type: str
    difference: float
    """In levels for integers, else in units of the tensor; of a whole run the root mean square."""
    allowed: float
    """The difference that rounding explains."""
    got: float
    """Value of the engine where the difference is largest."""
    expected: float
    """Value of the graph as written, there."""

    @property
    def ok(self) -> bool:
        """Return whether rounding explains the difference."""
        return self.difference <= self.allowed


class Verification(NamedTuple):
    """How a quantized model runs in its engine."""

    engine: Engine
    ran: str
    """What was run."""
    checks: list[TensorCheck]
    num_batches: int

    @property
    def wrong(self) -> list[TensorCheck]:
        """Return the tensors that differ by more than rounding explains, in the order of the graph."""
        return [check for check in self.checks if not check.ok]

    def __repr__(self) -> str:
        """Return the result in one line."""
        return f"Verification({self})"

    def _repr_html_(self) -> str:
        """Return a table for notebooks, of the tensors that differ or else of all."""
        cells = [
            (one.tensor, one.node, number(one.difference), number(one.allowed)) for one in self.wrong or self.checks
        ]
        return html_table(str(self), ("tensor", "node", "difference", "allowed"), cells)

    def __str__(self) -> str:
        """Return the result in one sentence."""
        if self.engine == "tensorrt":
            return f"{self.ran} was not run; its rules hold, and onnxruntime runs the model as it is written"
        if not self.wrong:
            return f"{self.ran}: {len(self.checks)} of {len(self.checks)} tensors match the model"
        first = self.wrong[0]
        where = (
            f"`{first.tensor}` of {first.node}" if first.node == WHOLE_RUN else f"`{first.tensor}`, node `{first.node}`"
        )
        return (
            f"{self.ran}: {len(self.wrong)} of {len(self.checks)} tensors do not match the model, first {where}: "
            f"expected {first.expected:.6g}, got {first.got:.6g} (differs by {first.difference:.3g}, rounding explains "
            f"{first.allowed:.3g})"
        )


class Rows:
    """The comparisons so far: of each tensor the largest difference."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self.num_batches = graph, 0
        self._rows: dict[tuple[str, str], TensorCheck] = {}

    def compare(self, names: Sequence[str], found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
        """Compare tensors that were computed from the same integers."""
        for name in names:
            difference = _difference(found[name], expected[name])
            allowed = LEVELS if found[name].dtype.kind in "iub" else RELATIVE * _largest(expected[name])
            size = float(difference.max(initial=0.0))
            self._add(*self._origin(name), size, allowed, *_worst(difference, found[name], expected[name]))

    def compare_whole(
        self, names: Sequence[str], engine: Session, written: Session, feed: Feed, floats: Session | None = None
    ) -> None:
        """Compare the outputs of two whole runs, in which all roundings may differ.

        Where the float model is given, they may differ by a few times what quantization changes its outputs.
        """
        found, expected = engine(names, feed), written(names, feed)
        nudged = written(names, {name: _nudge(array) for name, array in feed.items()})
        exact = floats(names, feed) if floats else expected
        for name in names:
            difference, spread, noise = (_difference(one[name], expected[name]) for one in (found, nudged, exact))
            allowed = max(NOISE * (_rms(expected[name]) or SILENT), NUDGED * _rms(spread), NUDGED * _rms(noise))
            worst = _worst(difference, found[name], expected[name])
            self._add(name, WHOLE_RUN, "", _rms(difference), allowed, *worst)

    def result(self, engine: Engine, ran: str) -> Verification:
        """Return all of them."""
        return Verification(engine, ran, list(self._rows.values()), self.num_batches)

    def _origin(self, name: str) -> tuple[str, str, str]:
        """Return the tensor before its quantizer, and name and operator of the node that computes it."""
        node = self._graph.producers.get(name)
        if node is not None and node.op_type == QUANTIZE and node.input[0] in self._graph.producers:
            name, node = node.input[0], self._graph.producers[node.input[0]]
        return (name, name, "input") if node is None else (name, label(node), node.op_type)

    def _add(self, tensor: str, node: str, *numbers: Any) -> None:
        new, old = TensorCheck(tensor, node, *numbers), self._rows.get((tensor, node))
        if old is None or new.difference - new.allowed > old.difference - old.allowed:
            self._rows[tensor, node] = new


def _difference(found: Array, expected: Array) -> Array:
    """Return the absolute difference, float64; 0 where neither is finite in the same way, inf where only one is."""
    if found.shape != expected.shape or found.dtype.kind not in "iubf":
        return np.array([0.0 if np.array_equal(found, expected) else np.inf])
    a, b = found.astype(np.float64), expected.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference: Array = np.where(same, 0.0, np.abs(a - b))
    return np.where(np.isnan(difference), np.inf, difference)


def _worst(difference: Array, found: Array, expected: Array) -> tuple[float, float]:
    if difference.shape != found.shape or not found.size:
        return np.nan, np.nan
    at = np.unravel_index(int(difference.argmax()), difference.shape)
    return float(found[at]), float(expected[at])


def _finite(values: Array) -> Array:
    wide = values.astype(np.float64) if values.dtype.kind in "iubf" else np.zeros(0)
    return wide[np.isfinite(wide)]


def _largest(values: Array) -> float:
    return float(np.abs(_finite(values)).max(initial=0.0))


def _rms(values: Array) -> float:
    if np.isinf(values).any() if values.dtype.kind == "f" else False:
        return float("inf")
    finite = _finite(values)
    return float(np.sqrt((finite**2).mean())) if finite.size else 0.0


def _nudge(array: Array) -> Array:
    """Return an input that is half a level off, up and down by turns; integers and zeros stay."""
    if array.dtype.kind != "f" or not array.size:
        return array
    signs = np.where(np.arange(array.size) % 2, 1, -1).reshape(array.shape)
    return np.asarray(array + signs * (_largest(array) / 255) * (array != 0), array.dtype)
