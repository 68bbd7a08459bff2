"""Compare a float ONNX model with its quantized form on an engine."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import onnx

from klquant.errors import InvalidInputError

from ...accuracy.classes import Array
from ...accuracy.comparison import Comparison, Metric, compare_models
from ...batches import numbered, tracked
from ...settings import check_choice
from ..execution import Session, open_onnxruntime, open_openvino
from ..feeds import Input, from_reader, make_feed, read_inputs
from ..model.graph import read_graph
from ..model.loading import check_graph, read_model, wanted
from ..model.saving import MAX_BYTES, num_bytes

Runner: TypeAlias = Literal["onnxruntime", "openvino"]
THREADS = 1  # what else the machine does changes the time of one thread least


class RunnableModel(NamedTuple):
    """A model, and what is known of it before it runs."""

    model: onnx.ModelProto
    inputs: list[Input]
    outputs: list[str]
    size: int
    """Bytes of its file."""

    @classmethod
    def of(cls, name: str, model: onnx.ModelProto | str | Path) -> "RunnableModel":
        """Load a model; errors name it."""
        where = f"`{model}`" if isinstance(model, str | Path) else f"`{name}`"
        with wanted(f"{where} must be a valid ONNX model"):
            loaded = read_model(model) if isinstance(model, str | Path) else model
            if not isinstance(loaded, onnx.ModelProto):
                raise InvalidInputError(f"`{name}` must be an onnx.ModelProto or a path, got {type(loaded).__name__}")
            check_graph(loaded)
        graph = read_graph(loaded)
        size = num_bytes(loaded)
        return cls(loaded, read_inputs(loaded, graph), graph.outputs, size if size > MAX_BYTES else loaded.ByteSize())

    def feed(self, batch: Any, where: str) -> dict[str, Array]:
        """Return a batch by input name; errors name the batch."""
        try:
            return make_feed(batch, self.inputs)
        except InvalidInputError as error:
            raise InvalidInputError(f"{where}: {error}") from error

    @contextmanager
    def exact(self) -> Iterator[Session]:
        """Yield the model in float32: onnxruntime runs it, because OpenVINO takes bfloat16 where the CPU has it."""
        with open_onnxruntime(self.model, optimized=True) as session:
            yield session

    @contextmanager
    def running(self, engine: Runner) -> Iterator[Session]:
        """Yield the model as an engine runs it, on one thread."""
        if engine == "openvino":
            with open_openvino(self.model) as session:
                yield session
        else:
            with open_onnxruntime(self.model, optimized=True, threads=THREADS) as session:
                yield session


def compare(
    float_model: onnx.ModelProto | str | Path,
    int8_model: onnx.ModelProto | str | Path,
    batches: Iterable[Any],
    *,
    engine: Runner,
    labels: Array | None = None,
    metric: Metric | None = None,
    progress: bool = True,
) -> Comparison:
    """Run a float model and its quantized form on the same data and compare outputs, time and size.

    Parameters
    ----------
    float_model, int8_model : onnx.ModelProto or path
        With the same inputs and outputs.
    batches : iterable
        Data that calibration has not seen, in any form that :func:`calibrate` takes; iterated once.
    engine : {"onnxruntime", "openvino"}
        The engine that runs both models, on one CPU thread. onnxruntime always computes the outputs of the float model.
    labels : array, shape (samples,), integers, optional
        The true class of each sample, in the order of the batches.
    metric : callable, optional
        From the outputs of both models, each a list with one mapping of arrays by output name for each batch, to a
        number such as the share of equal results. With it, outputs may have other shapes in both models, like lists
        of boxes: then only the metric compares them, and their numbers are NaN.
    progress : bool
        Show a bar on a terminal or in a notebook.

    Returns
    -------
    Comparison
        Of each output the SQNR in dB, the cosine, and the top-1 agreement where it looks like scores of classes: a
        matrix whose rows are not of length 1, or probabilities on the last axis. Also the median time of the first
        batch, in turns, and the sizes of the files.

    Raises
    ------
    InvalidInputError
        For invalid models, models whose inputs or outputs differ, batches or labels that do not fit, no batches.
    ModelError
        If the engine cannot load or run a model.
    MissingDependencyError
        For "openvino" without openvino.

    Notes
    -----
    Positions that an input whose name ends in "attention_mask" leaves out do not count in outputs of shape (samples,
    positions, ..., channels); `metric` gets all.

    Memory: the outputs of one batch at a time, and with `metric` the outputs of all batches.
    """
    check_choice("engine", engine, ("onnxruntime", "openvino"))
    first, second = RunnableModel.of("float_model", float_model), RunnableModel.of("int8_model", int8_model)
    _check_alike(first, second)
    shown = numbered(tracked(from_reader(batches, once=True), "comparing" if progress else ""))
    feeds = (first.feed(batch, f"batch {k}") for k, batch in shown)
    with first.exact() as reference, first.running(engine) as one, second.running(engine) as other:
        exact, float_run, int8_run = (partial(session, first.outputs) for session in (reference, one, other))
        return compare_models(
            (exact, int8_run),
            feeds,
            timed=(float_run, int8_run),
            sizes=(first.size, second.size),
            labels=labels,
            metric=metric,
        )


def _check_alike(first: RunnableModel, second: RunnableModel) -> None:
    """Raise InvalidInputError unless both models take and return the same."""
    inputs = [[(one.name, str(one.dtype)) for one in model.inputs] for model in (first, second)]
    if inputs[0] != inputs[1]:
        raise InvalidInputError(f"both models must have the same inputs, got {inputs[0]} and {inputs[1]}")
    if set(first.outputs) != set(second.outputs):
        raise InvalidInputError(f"both models must have the same outputs, got {first.outputs} and {second.outputs}")
