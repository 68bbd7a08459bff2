"""From a float model and thresholds to a model with Q/DQ that an engine executes in INT8."""

import logging
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import NamedTuple

import onnx

from klquant.errors import InvalidInputError

from ..calibration import Calibration, checked
from ..html_tables import html_skipped, html_table
from ..settings import EXCLUDED, Engine, check_engine
from ..text import number
from ..warning import warn_of_floats
from .model.fingerprint import fingerprint
from .model.graph import Graph
from .model.operators import observed_tensors
from .model.preparation import Prepared, prepare
from .model.saving import save_model
from .model.signs import non_negative
from .qdq.floats import body_layers
from .qdq.grids import Rule, by_sign, make_grids, signed, unsigned
from .qdq.insertion import write_qdq
from .qdq.plan import Plan, make_plan

RULES: dict[Engine, Rule] = {"tensorrt": signed, "onnxruntime": unsigned, "openvino": by_sign}
logger = logging.getLogger("klquant")


class QDQModel(NamedTuple):
    """A model with Q/DQ."""

    model: onnx.ModelProto
    thresholds: dict[str, float]
    """T of each quantized activation, by name of the tensor; those that share a scale have the same."""
    skipped: dict[str, str]
    """Layers that stay in floating point, by name of the node, and why."""

    def save(self, path: str | Path) -> None:
        """Write the model, whole or not at all; above 2 GB with its weights in a file beside it."""
        save_model(self.model, path)

    def _repr_html_(self) -> str:
        """Return a table of the thresholds for notebooks."""
        rows = [(name, number(threshold)) for name, threshold in self.thresholds.items()]
        caption = f"ONNX model quantized: {len(rows)} activations"
        return html_table(caption, ("tensor", "T"), rows) + html_skipped(self.skipped)


def quantize(
    model: onnx.ModelProto | str | Path | Prepared,
    calibration: Calibration | Mapping[str, float],
    *,
    engine: Engine = "tensorrt",
    exclude: Iterable[str] | str = (),
    reduce_range: bool = False,
) -> QDQModel:
    """Write QuantizeLinear and DequantizeLinear where an engine wants them.

    Parameters
    ----------
    model : onnx.ModelProto, path or Prepared
        A float model, of opset 13 or of one that onnx can raise to it. It is not changed.
    calibration : Calibration, or mapping
        From :func:`calibrate` on this model, or T in units of the activation, by name of the tensor.
    engine : {"tensorrt", "onnxruntime", "openvino"}
        For which engine; see Notes.
    exclude : patterns
        Names of nodes, of tensors or of operators; what they match stays in floating point.
    reduce_range : bool
        Keep weights in -63 .. 63. On CPUs without VNNI instructions onnxruntime's products of UINT8 and INT8 saturate.

    Returns
    -------
    QDQModel

    Raises
    ------
    InvalidInputError
        For another engine, a pattern that matches nothing, a calibration of another model (naming what differs) or
        of other than 8 bits, a threshold that is not positive, a weight that is not finite; naming tensor or node.

    Warns
    -----
    CalibrationWarning
        If layers stay in floating point that were not excluded.

    Notes
    -----
    Weights are INT8 for each output channel, the scale of a channel is max |w| / 127, in every engine.

    "tensorrt" quantizes what enters Conv, ConvTranspose, Gemm and MatMul, the shortcut (not the other branch) of a
    residual sum, and what is concatenated by one scale, in INT8 with zero point 0. Biases stay.

    "openvino" quantizes what enters these layers: UINT8 for what cannot be negative, [0, T], INT8 else. Biases stay.

    "onnxruntime" quantizes what enters and leaves each operator that has an INT8 kernel on CPUs, in UINT8: zero point
    0 and [0, T] for what cannot be negative, 128 and [-T, T] else. Biases are INT32 where they fit.

    QuantizeLinear saturates at -128, so values below -T may get one level more than the symmetric -127.
    Source: TensorRT, "Working with Quantized Types"; onnxruntime 1.32 and OpenVINO 2026.4 as measured.
    """
    check_engine(engine)
    prepared = prepare(model)
    graph = prepared.graph
    _check_types(prepared)
    patterns = _check_patterns(graph, exclude)
    if isinstance(calibration, Calibration):
        calibration.check_fits(fingerprint(graph) if calibration.model else {})
        patterns += tuple(map(escape, calibration.skipped))
    thresholds = _thresholds(calibration)
    plan = make_plan(graph, thresholds, engine, patterns)
    grids = make_grids(plan, thresholds, non_negative(graph), RULES[engine])
    written = write_qdq(prepared.model, graph, plan, grids, int_bias=engine == "onnxruntime", reduce_range=reduce_range)
    _tell(plan)
    return QDQModel(written, {name: grid.threshold for name, grid in grids.items()}, plan.skipped)


def quantizable_tensors(model: onnx.ModelProto | str | Path | Prepared, engine: Engine) -> list[str]:
    """Return the names of the activations that :func:`quantize` quantizes if it has a threshold for each.

    Parameters
    ----------
    model : onnx.ModelProto, path or Prepared
        A float model, as :func:`quantize` takes it.
    engine : {"tensorrt", "onnxruntime", "openvino"}
        The engine that will run the model.

    Returns
    -------
    list of str
        In the order in which :func:`quantize` visits them.

    Raises
    ------
    InvalidInputError
        For an unknown engine, or a model that :func:`prepare` rejects.
    """
    check_engine(engine)
    graph = prepare(model).graph
    return list(make_plan(graph, observed_tensors(graph), engine).readers)


def _check_types(prepared: Prepared) -> None:
    opset = next(entry.version for entry in prepared.model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < 19 and onnx.TensorProto.FLOAT16 in prepared.graph.types.values():
        raise InvalidInputError(f"quantizers of float16 need opset 19 or newer, got a model of opset {opset}")


def _thresholds(calibration: Calibration | Mapping[str, float]) -> dict[str, float]:
    """Return T by tensor, checked."""
    if isinstance(calibration, Mapping):
        found = {name: float(value) for name, value in calibration.items()}
    else:
        layers = checked(calibration).thresholds
        found = {name: layer.threshold for name, layer in layers.items()}
        for name, layer in layers.items():
            if layer.num_bits != 8:
                raise InvalidInputError(f"tensor `{name}` must be calibrated for 8 bits, got {layer.num_bits}")
    if not found:
        raise InvalidInputError("expected thresholds, got none; call search_thresholds() first")
    for name, value in found.items():
        if not 0 < value < float("inf"):
            raise InvalidInputError(f"the threshold of `{name}` must be positive and finite, got {value}")
    return found


def _check_patterns(graph: Graph, exclude: Iterable[str] | str) -> tuple[str, ...]:
    """Refuse a pattern that matches nothing: it is misspelt."""
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    nodes = [name for node in graph.nodes for name in (node.name, node.op_type)]
    bodies = [path for node in graph.nodes for path in body_layers(graph, node)]
    names = list(dict.fromkeys([*nodes, *bodies, *graph.inputs, *graph.producers]))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise InvalidInputError(f"pattern `{pattern}` matches no node, tensor or operator, such as {close}")
    return patterns


def _tell(plan: Plan) -> None:
    """Log what was done, warn of what stays in floating point without having been asked to."""
    logger.info("%d activations and %d weights quantized", len(plan.readers), len(plan.weights))
    reasons = {name: reason for name, reason in plan.skipped.items() if reason != EXCLUDED}
    if not plan.readers and not plan.skipped:
        reasons = {"": "the model has no operator that can be quantized"}
    warn_of_floats("node", reasons)
