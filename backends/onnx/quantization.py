"""Quantize a float ONNX model: add the Q/DQ nodes that let an engine run it in INT8."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import onnx

from klquant.errors import InvalidInputError, ModelError

from ..calibration import Calibration
from ..ranges import Range
from ..settings import EXCLUDED, WEIGHTED, Engine, check_engine
from ..warning import quiet, warn_of_floats
from .accuracy.noise_warning import warn_of_noise
from .correction.bias_correction import MAX_BATCHES
from .correction.data import spread
from .engines.tensorrt_exclusions import slow_in_tensorrt
from .feeds import from_reader
from .model.graph import read_graph
from .model.observed import observed_tensors
from .model.preparation import Prepared, prepare
from .placement import Placement, excluded_names, find_ranges
from .qdq.first_layers import FASTER
from .qdq.float16 import to_float16, too_large
from .qdq.insertion import write_qdq
from .qdq.plan import Plan
from .qdq.rules import make_plan
from .qdq_model import QDQModel
from .refinement.corrected_choice import Chosen, best_corrected
from .refinement.layer_choice import COSTLY, refined
from .refinement.place import Place, Refined, Write
from .refinement.range_choices import Base
from .tensor_checks import Verification
from .verification import verify

MAX_VERIFIED = 4
"""How many batches the engine runs to be compared with the model as written."""
logger = logging.getLogger("klquant")


def quantize(  # noqa: PLR0913 the options of a quantization
    model: onnx.ModelProto | str | Path | Prepared,
    calibration: Calibration | Mapping[str, float],
    *,
    engine: Engine = "tensorrt",
    exclude: Iterable[str] | str = (),
    reduce_range: bool = False,
    batches: Iterable[Any] | None = None,
    correct_bias: bool | None = None,
    adaround: bool | None = None,
    min_int8: float = 0.8,
    asymmetric: bool = True,
    float16: bool = False,
    skip_slow: bool = False,
) -> QDQModel:
    """Add QuantizeLinear and DequantizeLinear nodes where an engine needs them.

    Parameters
    ----------
    model : onnx.ModelProto, path or Prepared
        A float model. onnx converts opsets below 13. It is not changed.
    calibration : Calibration or mapping
        From :func:`calibrate` on this model; or T by tensor name, in units of the activation.
    engine : {"tensorrt", "onnxruntime", "openvino"}
        The engine that will run the model; see Notes.
    exclude : str or iterable of str
        Patterns of node names, tensor names or operator types that stay in floating point.
    reduce_range : bool
        Keep weights in -63 .. 63, for CPUs without VNNI: there onnxruntime's products of UINT8 and INT8 saturate.
    batches : iterable, optional
        Some data; at most 32 batches are read. They serve to choose ranges and the layers that stay in floating point,
        and to correct biases; the more there are, the better. The engine runs the quantized model on the first 4, and
        is compared with the model as written, see :func:`verify`.
    correct_bias : bool, optional
        Whether to correct the biases by the shift that quantization causes in the mean of each output channel. By
        default they are corrected if there are `batches`, and if that lowers the error of the outputs on those batches
        that did not supply the corrections.
    adaround : bool, optional
        Whether to round weights up or down so that the outputs of their layer change least, instead of to the nearest
        level. By default they are rounded so if there are `batches`, unless the error of the model's outputs grows.
    min_int8 : float
        The least share of the layers that stays in INT8; of their multiplications at most twice the rest is left out.
        With `batches`, the layers that cost the outputs most stay in floating point within that limit, if that lowers
        the error of the outputs. With 1 layers and ranges are not chosen by the outputs, and no channels are scaled.
    asymmetric : bool
        Use UINT8 over [low, high] with a zero point for activations where that has less expected error than [-T, T].
        Needs a Calibration. No effect for "tensorrt", which has no zero points.
    float16 : bool
        Compute what is not quantized in float16, for "tensorrt" only. Inputs and outputs of the model keep their types.
        Nodes with values beyond 65504 in the calibration stay in float32.
    skip_slow : bool
        Leave out the layers that :func:`slow_in_tensorrt` names, for "tensorrt" only.

    Returns
    -------
    QDQModel

    Raises
    ------
    InvalidInputError
        For an unknown engine, a pattern that matches nothing, a calibration of another model or not of 8 bits, a
        threshold that is not positive, or a weight that is not finite. The message names the tensor or node. For
        `correct_bias` or `adaround` without `batches`, and `min_int8` outside 0 .. 1.
    ModelError
        If `batches` are given and the engine cannot run the model, or computes something else. Names the first node.

    Warns
    -----
    CalibrationWarning
        If layers that were not excluded stay in floating point. With `batches`, also if the SQNR of an output is below
        10 dB on up to 4 samples each of up to 4 of them.

    Notes
    -----
    For every engine, weights are INT8 per output channel, with scale max |w| / 127, or more where INT32 could not hold
    the bias otherwise. A weight of MatMul that is not a matrix has one scale.

    For "onnxruntime" and "openvino", large tables of embeddings (Gather) are INT8 too, with one scale for each element
    of a vector.

    "tensorrt" quantizes the inputs of Conv, ConvTranspose, Gemm and MatMul, the shortcut (not the residual branch) of
    a residual sum, and the inputs of a concatenation, which share one scale. All are INT8 with zero point 0. Biases
    stay in floating point.

    "openvino" quantizes the inputs of the same layers: UINT8 over [0, T] for tensors that cannot be negative, INT8 for
    all others. Biases stay in floating point.

    "onnxruntime" quantizes the inputs and outputs of every operator that has an INT8 kernel on CPUs. All are UINT8:
    over [0, T] with zero point 0 for tensors that cannot be negative, over [-T, T] with zero point 128 otherwise.
    Biases are INT32 where they fit. HardSwish, HardSigmoid, PRelu and products with scalars become operators with INT8
    kernels; depthwise convolutions get channels of zeros, up to a multiple of 16. Narrow convolutions at the start of a
    network stay in floating point, where they are faster: at most a tenth of its layers.

    With `asymmetric`, T of a guarded tensor (``LayerThreshold.guarded``) may change: the criterion
    searched it for [-T, T], and a range with fewer negative values has finer steps. If the T of mse or max has 1 dB
    less expected error on the grid in use, the widest T within 1 dB of the best is taken.

    With `asymmetric`, if pointwise functions such as SiLU, GELU, HardSwish, Sigmoid or Clip are all that reads a tensor
    that onnxruntime quantizes, its range is fitted to the error behind them: before SiLU all values below -8 are nearly
    alike, and need no levels. That holds for all criteria, but only a guarded T may grow.

    With `asymmetric`, the range is the part of [-T, T] between the smallest and the largest value of the calibration
    data, and 0, where that has less expected error. It gains most behind SiLU, GELU, HardSwish and LeakyRelu, whose
    negative values are small. Activations that share a scale get the union of their ranges. OpenVINO gets zero points
    other than 0 only at convolutions without padding, or depthwise ones; others are slower with them. An activation
    with a given threshold stays symmetric.

    Biases are corrected after Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
    2019. Conv, ConvTranspose and Gemm get a bias if they have none; a MatMul has one in an Add of a constant behind it.
    Before that, channels are shifted by up to half a step so that frequent values, such as the background of a page,
    lie on levels, where constants before and behind a float32 tensor can take that up without a node more.
    Correcting takes about four runs of the float model and eight of the quantized one over `batches`, twice if ranges,
    channels or layers were changed.

    With `adaround`, the inputs of each Conv, Gemm and MatMul are taken from the float model, at up to 4096 positions
    of up to 8 batches. For each output channel, one weight after the other is rounded the other way where that lowers
    the squared error on them (after Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020;
    by turning weights over, not by gradients). Layers with more than 6000 inputs for each output, and those that share
    a weight, are rounded to nearest. It takes some seconds, for large models up to a few minutes.

    With `batches`, `min_int8` below 1 and more than one sample, what a quantizer costs is measured in the outputs,
    on about 4 samples of up to 4 batches: groups of neighbours round together, and the group with the most noise is
    halved until 48 runs are used. Where T of a tensor is guarded, the range that clips nothing is taken unless it
    causes more than 1.25 times the noise: other data has larger values than these samples. Where a MatMul or Gemm
    reads a tensor whose T is guarded or amax, SmoothQuant is tried (see :func:`smooth`), with ranges from
    `batches`. About 16 samples of up to 4 other batches decide between these, and how many layers are left out.
    Then all this is done once more with what was left out. For "onnxruntime", it is also done with the pointwise
    functions between layers, such as SiLU, in floating point, if the layers multiply at least 100 times for each of
    their values: that spares quantizers, and takes time. With them, depthwise convolutions are tried in floating
    point, as far as `min_int8` lets. At the end biases are corrected with and without these changes, and the model
    with the least error of the outputs is taken. ``smoothed``, ``skipped`` and ``float_nodes`` name what was
    changed.

    With `float16`, scales are float16 too, which takes opset 19 and TensorRT 10. onnxruntime's converter does it. The
    quantizers were not fitted to it: thresholds come from the float32 model.

    QuantizeLinear saturates at -128, so values below -T may get -128 instead of the symmetric -127.
    Sources: TensorRT, "Working with Quantized Types"; measurements of onnxruntime 1.32 and OpenVINO 2026.4.
    """
    check_engine(engine)
    _check_options(batches, min_int8, correct_bias=correct_bias, adaround=adaround)
    _check_tensorrt_options(engine, float16=float16, skip_slow=skip_slow)
    some = None if batches is None else list(islice(from_reader(batches, once=True), MAX_BATCHES))
    exact = prepare(model)
    slow = tuple(slow_in_tensorrt(exact)) if skip_slow else ()
    excluded = (*excluded_names(exact, calibration, exclude), *slow)
    ranges = find_ranges(exact, calibration, engine, asymmetric=asymmetric)
    write = _writer(calibration, engine, reduce_range=reduce_range)
    place = Place(exact, engine, excluded, write, float16)
    tried, chosen = [Refined(Base(exact, [ranges]), ranges)], None
    if some is not None and min_int8 < 1:
        with quiet():
            tried = refined(place, ranges, calibration, some, min_int8)
    if some is not None:
        chosen = best_corrected(place, tried, some, correct_bias, adaround=adaround)
    found, placement, corrections = chosen or Chosen(tried[0], place.placed(tried[0]))
    written = write(placement)
    if float16:
        written = to_float16(written, too_large(read_graph(written), calibration))
    plan = placement.plan
    if found.left_out:
        spared = {name for name, why in plan.skipped.items() if why == EXCLUDED} - set(excluded)
        plan = plan._replace(skipped=plan.skipped | dict.fromkeys(spared, COSTLY))
    _report(plan)
    checked_run = None if some is None else _verified(exact, written, some, engine)
    scaled = found.base.scaled
    thresholds, ends = _described(exact, placement, calibration, scaled)
    smoothed = tuple(dict.fromkeys(scaled.values()))
    others = (node.name for node in exact.graph.nodes if node.op_type not in WEIGHTED)
    float_nodes = tuple(name for name in others if name in found.floats)
    return QDQModel(written, thresholds, plan.skipped, checked_run, corrections, ends, smoothed, float_nodes)


def _writer(calibration: Calibration | Mapping[str, float], engine: Engine, *, reduce_range: bool) -> Write:
    """Return a function that writes the model with Q/DQ."""
    dead_channel = calibration.settings.dead_channel if isinstance(calibration, Calibration) else 0.0
    options: dict[str, Any] = {"int_bias": engine == "onnxruntime", "dead_channel": dead_channel}

    def write(placed: Placement) -> onnx.ModelProto:
        floats, plan, grids = placed[:3]
        return write_qdq(floats.model, floats.graph, plan, grids, reduce_range=reduce_range, **options)

    return write


def _described(
    exact: Prepared,
    placement: Placement,
    calibration: Calibration | Mapping[str, float],
    scaled: Mapping[str, str],
) -> tuple[dict[str, float], dict[str, Range]]:
    """Return T of each activation that was calibrated, and the range of each, by their names in the given model."""
    known = calibration.thresholds if isinstance(calibration, Calibration) else calibration
    tensors, found = exact.graph.tensors(), placement.given()
    named = {scaled[name]: grid for name, grid in found.items() if name in scaled} | found
    given = {name: grid for name, grid in named.items() if name in tensors}
    thresholds = {name: grid.threshold for name, grid in given.items() if name in known}
    return thresholds, {name: grid.range for name, grid in given.items()}


def _check_options(batches: Iterable[Any] | None, min_int8: float, **corrections: bool | None) -> None:
    for name, wanted in corrections.items():
        if wanted and batches is None:
            raise InvalidInputError(f"`{name}` needs `batches` to measure with, got none")
    if not 0 <= min_int8 <= 1:
        raise InvalidInputError(f"`min_int8` must be between 0 and 1, got {min_int8!r}")


def _check_tensorrt_options(engine: Engine, **options: bool) -> None:
    for name, value in options.items():
        if value and engine != "tensorrt":
            raise InvalidInputError(f'`{name}` needs engine="tensorrt", got {engine!r}')


def _verified(exact: Prepared, quantized: onnx.ModelProto, batches: Sequence[Any], engine: Engine) -> Verification:
    """Return what the engine's run shows; warn if the outputs are far from those of the float model."""
    found = verify(quantized, batches[:MAX_VERIFIED], engine, float_model=exact.model)
    if found.wrong:
        raise ModelError(f"the engine must compute what the quantized model says, got: {found}")
    warn_of_noise(exact, quantized, spread(batches, MAX_VERIFIED), optimized=engine == "onnxruntime")
    return found


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
        In the order in which :func:`quantize` handles them.

    Raises
    ------
    InvalidInputError
        For an unknown engine, or a model that :func:`prepare` rejects.
    """
    check_engine(engine)
    graph = prepare(model).graph
    observed = observed_tensors(graph)
    readers = make_plan(graph, observed, engine).readers
    return [name for name in readers if name in observed]


def _report(plan: Plan) -> None:
    """Log what was quantized, and warn of layers that stay in floating point without being excluded."""
    logger.info("%d activations and %d weights quantized", len(plan.readers), len(plan.weights))
    reasons = {name: reason for name, reason in plan.skipped.items() if reason not in (EXCLUDED, FASTER, COSTLY)}
    if not plan.readers and not plan.skipped:
        reasons = {"": "the model has no operator that can be quantized"}
    warn_of_floats("node", reasons)
