"""Load untrusted models: count weights before loading them, and nodes before inlining functions.

onnx itself reads external weights from the model's folder only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from klquant.errors import InvalidInputError, KLQuantError

from ...npz import MAX_BYTES
from .normal_form import all_nodes, model_nodes

MAX_NODES = 100_000
"""Nodes of a graph with its functions inlined: onnxruntime needs time proportional to their square."""


@contextmanager
def wanted(expectation: str) -> Iterator[None]:
    """Turn errors of onnx and onnxruntime into an InvalidInputError that states the expectation."""
    try:
        yield
    except (KLQuantError, OSError):
        raise
    except Exception as error:  # onnx, onnxruntime and protobuf have no common base
        raise InvalidInputError(f"{expectation}, got: {error}") from error


@contextmanager
def blaming_invalid_model(model: onnx.ModelProto) -> Iterator[None]:
    """If the block fails on an invalid model, report the model instead of the failure.

    That includes an operator of another domain with the name of an ONNX operator.
    """
    try:
        yield
    except KLQuantError:
        raise
    except Exception:
        with wanted("`model` must be a valid ONNX model"):
            onnx.checker.check_model(model)
            for node in model.graph.node:
                if node.domain not in ("", "ai.onnx") and onnx.defs.has(node.op_type):
                    raise ValueError(f"{node.op_type} of domain `{node.domain}`") from None
        raise


def read_model(path: str | Path) -> onnx.ModelProto:
    """Return a model with all its weights; raise ValueError, or an error of onnx, if that fails."""
    model = onnx.load(str(path), format="protobuf", load_external_data=False)
    check_graph(model)
    _check_weights(model, Path(path).parent)
    onnx.load_external_data_for_model(model, str(Path(path).parent))
    return model


def check_graph(model: onnx.ModelProto) -> None:
    """Raise ValueError for names that are not text, a cycle, or too many nodes with functions inlined."""
    for text in _texts(model):
        if not isinstance(text, str):  # protobuf returns bytes for invalid UTF-8
            raise ValueError(f"names must be Unicode text, got {text!r:.80}")
    nodes = list(enumerate(model.graph.node))
    producers = {name: k for k, node in nodes for name in node.output if name}
    reads = {k: {producers[name] for name in node.input if name in producers} for k, node in nodes}
    TopologicalSorter(reads).prepare()  # raises ValueError for a cycle
    calls = {_key(function): [_called(node) for node in all_nodes(function)] for function in model.functions}
    sizes: dict[tuple[str, ...], int] = {}
    for key in TopologicalSorter({key: calls.keys() & set(called) for key, called in calls.items()}).static_order():
        sizes[key] = sum(sizes.get(called, 1) for called in calls[key])
    total = sum(sizes.get(_called(node), 1) for node in all_nodes(model.graph))
    if total > MAX_NODES:
        raise ValueError(f"a graph must have at most {MAX_NODES} nodes with its functions inlined, got {total}")


def _texts(model: onnx.ModelProto) -> Iterator[str]:
    graph = model.graph
    named = graph.initializer, graph.input, graph.output, graph.value_info, model.functions
    yield from (one.name for one in chain(*named))
    for node in model_nodes(model):
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def _key(function: onnx.FunctionProto) -> tuple[str, ...]:
    return function.domain.removeprefix("ai.onnx"), function.name, function.overload


def _called(node: onnx.NodeProto) -> tuple[str, ...]:
    return node.domain.removeprefix("ai.onnx"), node.op_type, node.overload


def _check_weights(model: onnx.ModelProto, folder: Path) -> None:
    """Raise ValueError if the weights are far larger than their files: many may point at the same bytes."""
    described = [ExternalDataInfo(tensor) for tensor in _tensors(model) if uses_external_data(tensor)]
    paths = {info.location: folder / info.location for info in described}
    sizes = {name: path.stat().st_size if path.is_file() else 0 for name, path in paths.items()}
    total = sum(sizes[info.location] if info.length is None else info.length for info in described)
    limit = max(MAX_BYTES, 2 * sum(sizes.values()))
    if total > limit:
        raise ValueError(f"weights must take at most {limit} bytes, given files of {sum(sizes.values())}, got {total}")


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in model_nodes(model):
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for body in (attribute.g, *attribute.graphs):
                yield from body.initializer
