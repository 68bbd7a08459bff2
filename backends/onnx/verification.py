"""Check that an engine computes what a quantized model says: tensor by tensor, against the graph as it is written.

Where a rounding falls the other way in one layer, all later layers see it, so whole runs can only be compared roughly.
Therefore the reference starts anew at each quantizer: it takes the integers that the engine computed, runs up to the
next quantizers, and its integers may differ from the engine's by one level. This takes one run of the engine and one of
the reference, and names the first node that differs.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import onnx

from klquant.errors import InvalidInputError, ModelError

from ..batches import numbered, tracked
from ..settings import Engine, check_engine
from .engines.inspected_model import load
from .engines.tensorrt import check_tensorrt
from .execution import (
    Feed,
    Session,
    cut_at,
    given,
    open_onnxruntime,
    open_openvino,
    quantized_tensors,
    unsteady_tensors,
    with_outputs,
)
from .feeds import from_reader, make_feed, read_inputs
from .model.graph import Graph, read_graph
from .tensor_checks import Rows, Verification


class _Result(Protocol):
    @property
    def model(self) -> onnx.ModelProto: ...


def verify(
    model: onnx.ModelProto | str | Path | _Result,
    batches: Iterable[Any],
    engine: Engine,
    *,
    float_model: onnx.ModelProto | None = None,
    progress: bool = True,
) -> Verification:
    """Run a quantized model in its engine and compare every tensor with the graph as it is written.

    Parameters
    ----------
    model : QDQModel, onnx.ModelProto or path of one
        With Q/DQ, as :func:`quantize` returns it.
    batches : iterable
        Some data, in any form that :func:`calibrate` takes. One batch is usually enough.
    engine : {"tensorrt", "onnxruntime", "openvino"}
        What the model was quantized for.
    float_model : onnx.ModelProto, optional
        What was quantized, with the same inputs and outputs. Outputs of whole runs may then differ by 3 times
        what quantization changes them: behind a softmax, one rounding may turn an answer over.
    progress : bool
        Show a bar on a terminal or in a notebook.

    Returns
    -------
    Verification
        ``wrong`` lists the tensors that differ by more than rounding explains.

    Raises
    ------
    InvalidInputError
        For another engine, an invalid ONNX model, batches that do not fit, no batches.
    ModelError
        If the engine cannot load or run the model; its own error is the cause.
    MissingDependencyError
        For "openvino" without openvino.

    Notes
    -----
    onnxruntime returns all integers. They are compared from quantizer to quantizer and may differ by one level, floats
    by 0.2 % of the largest value. Behind loops, recurrent layers and choices such as ArgMax and TopK, float32 rounding
    alone can change a value by any amount: there, only the outputs of whole runs are compared. OpenVINO returns only
    its outputs. Their noise may be 20 dB below them, or 3 times what half a level at the input causes. Layers that are
    not in INT8 run in float32 there, not in bfloat16, which is the default on some CPUs. TensorRT needs a GPU and is
    not run: `verify` checks that its documented rules hold and that onnxruntime can run the graph as written, and
    compares nothing.
    """
    check_engine(engine)
    loaded = load(model if isinstance(model, onnx.ModelProto | str | Path) else model.model)
    graph = read_graph(loaded)
    inputs = read_inputs(loaded, graph)
    shown = tracked(from_reader(batches, once=True), "verifying" if progress else "")
    feeds = (_located(number, batch, lambda batch: make_feed(batch, inputs)) for number, batch in numbered(shown))
    run = {"onnxruntime": _in_onnxruntime, "openvino": _in_openvino, "tensorrt": _for_tensorrt}[engine]
    with _opened(float_model) as floats:
        found = run(loaded, graph, feeds, floats)
    if not found.num_batches:
        raise InvalidInputError("expected at least one batch to verify the model with, got none")
    return found


def _opened(float_model: onnx.ModelProto | None) -> AbstractContextManager[Session | None]:
    return nullcontext() if float_model is None else open_onnxruntime(float_model, optimized=True)


def _located(number: int, batch: Any, convert: Callable[[Any], Feed]) -> Feed:
    try:
        return convert(batch)
    except InvalidInputError as error:
        raise InvalidInputError(f"batch {number}: {error}") from error


def _in_onnxruntime(
    model: onnx.ModelProto, graph: Graph, feeds: Iterable[Feed], floats: Session | None
) -> Verification:
    """Compare from quantizer to quantizer, and the outputs of a run that returns nothing else."""
    quantized = quantized_tensors(graph)
    names = list(dict.fromkeys([*quantized, *graph.outputs]))
    unsteady = unsteady_tensors(graph, quantized)
    steady = [name for name in names if name not in unsteady]
    rows = Rows(graph)
    with (
        open_onnxruntime(with_outputs(model, names), optimized=True) as engine,
        open_onnxruntime(cut_at(model, graph, quantized), optimized=False) as reference,
        open_onnxruntime(model, optimized=True) as whole,
        open_onnxruntime(model, optimized=False) as written,
    ):
        for rows.num_batches, feed in enumerate(feeds, start=1):
            found = engine(names, feed)
            integers = {given(name): found[name] for name in quantized}
            rows.compare(steady, found, reference(steady, {**feed, **integers}))
            rows.compare_whole(graph.outputs, whole, written, feed, floats)
    return rows.result("onnxruntime", "onnxruntime")


def _in_openvino(model: onnx.ModelProto, graph: Graph, feeds: Iterable[Feed], floats: Session | None) -> Verification:
    rows = Rows(graph)
    with open_onnxruntime(model, optimized=False) as written, open_openvino(model) as engine:
        for rows.num_batches, feed in enumerate(feeds, start=1):
            rows.compare_whole(graph.outputs, engine, written, feed, floats)
    return rows.result("openvino", "OpenVINO")


def _for_tensorrt(model: onnx.ModelProto, graph: Graph, feeds: Iterable[Feed], floats: Session | None) -> Verification:
    """Check the rules, and that the graph as written runs at all."""
    del floats  # nothing is compared
    if broken := check_tensorrt(model):
        raise ModelError(f"TensorRT must accept the model, got node `{broken[0].node}`: {broken[0].message}")
    rows = Rows(graph)
    with open_onnxruntime(model, optimized=False) as written:
        for rows.num_batches, feed in enumerate(feeds, start=1):
            outputs = written(graph.outputs, feed)
            rows.compare(graph.outputs, outputs, outputs)  # lists the outputs
    return rows.result("tensorrt", "TensorRT")
