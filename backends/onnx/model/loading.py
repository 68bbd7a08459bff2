"""A model from a file, which may come from anyone: what it would grow to is counted before it is loaded or inlined.

Files with weights are read from the model's folder only; onnx itself sees to that.
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
"""Of a graph, with its functions inlined: onnxruntime takes their square."""


@contextmanager
def wanted(wish: str) -> Iterator[None]:
    """Turn what onnx and onnxruntime raise into an error that says what was wanted."""
    try:
        yield
    except (KLQuantError, OSError):
        raise
    except Exception as error:  # each library has its own, and protobuf one more
        raise InvalidInputError(f"{wish}, got: {error}") from error


@contextmanager
def valid_or_refused(model: onnx.ModelProto) -> Iterator[None]:
    """Where something fails on a model that is not valid, say that instead; onnx refuses more than engines do.

    Or on an operator that only has the name of one of ONNX's.
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
    """Return a model with all its weights; a ValueError, or what onnx raises, else."""
    model = onnx.load(str(path), format="protobuf", load_external_data=False)
    check_graph(model)
    _check_weights(model, Path(path).parent)
    onnx.load_external_data_for_model(model, str(Path(path).parent))
    return model


def check_graph(model: onnx.ModelProto) -> None:
    """Refuse a graph with names that are no text, with a cycle, or too large once its functions are inlined."""
    for text in _texts(model):
        if not isinstance(text, str):  # protobuf gives bytes where they are no UTF-8
            raise ValueError(f"names must be Unicode text, got {text!r:.80}")
    givers = {name: k for k, node in enumerate(model.graph.node) for name in node.output if name}
    reads = {k: {givers[name] for name in node.input if name in givers} for k, node in enumerate(model.graph.node)}
    TopologicalSorter(reads).prepare()  # raises a ValueError
    calls = {_key(function): [_called(node) for node in all_nodes(function)] for function in model.functions}
    sizes: dict[tuple[str, ...], int] = {}
    for key in TopologicalSorter({key: calls.keys() & set(called) for key, called in calls.items()}).static_order():
        sizes[key] = sum(sizes.get(called, 1) for called in calls[key])
    total = sum(sizes.get(_called(node), 1) for node in all_nodes(model.graph))
    if total > MAX_NODES:
        raise ValueError(f"a graph of {MAX_NODES} nodes at most is read, with its functions inlined, not of {total}")


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
    """Refuse weights that are far more than the files that they are in: many may name the same bytes."""
    described = [ExternalDataInfo(tensor) for tensor in _tensors(model) if uses_external_data(tensor)]
    paths = {info.location: folder / info.location for info in described}
    sizes = {name: path.stat().st_size if path.is_file() else 0 for name, path in paths.items()}
    total = sum(sizes[info.location] if info.length is None else info.length for info in described)
    limit = max(MAX_BYTES, 2 * sum(sizes.values()))
    if total > limit:
        raise ValueError(f"weights of {limit} bytes at most are read from files of {sum(sizes.values())}, not {total}")


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in model_nodes(model):
        for attribute in node.attribute:
            yield attribute.t
            yield from attribute.tensors
            for body in (attribute.g, *attribute.graphs):
                yield from body.initializer
