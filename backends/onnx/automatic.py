"""Try every criterion and correction on an ONNX model: one call from a float model to a verified INT8 model."""

import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import onnx

from klquant.errors import CalibrationWarning

from ..accuracy.comparison import Metric
from ..accuracy.splits import Split, hold_back
from ..accuracy.trials import Recipe, Target
from ..automatic import Attempt, Automatic, Data, check_limit, try_until
from ..calibration import Calibration
from ..settings import CRITERIA, WEIGHTED, Engine, SettingsOptions, check_engine
from ..thresholds import LayerThreshold
from ..warning import warn
from .accuracy.comparison import RunnableModel
from .accuracy.criterion_choice import auto_thresholds
from .accuracy.engine_sessions import Reference, compared, open_reference, running
from .accuracy.steps import CHANGES, CORRECT_BIAS, REFINE, changes_of, options_of
from .calibration import calibrate
from .feeds import from_reader
from .model.preparation import Prepared, prepare
from .qdq.first_layers import FASTER
from .qdq_model import QDQModel
from .quantization import quantize
from .verification import verify

VERIFIED = 2  # batches
MIN_INT8 = 0.8


def auto(
    model: onnx.ModelProto | str | Path,
    batches: Iterable[Any],
    *,
    engine: Engine,
    target: str | float = 0.99,
    metric: Metric | None = None,
    validation: Iterable[Any] | None = None,
    max_seconds: float = 240.0,
    progress: bool = True,
    **settings: Unpack[SettingsOptions],
) -> Automatic[QDQModel]:
    """Quantize a model by every criterion and with every step, verify the best and compare it with the float model.

    Parameters
    ----------
    model : onnx.ModelProto or path
        A float model. It is not changed.
    batches : iterable
        Data in any form that :func:`calibrate` takes, to be iterated several times.
    engine : {"tensorrt", "onnxruntime", "openvino"}
        The engine that will run the model. For "tensorrt", which needs a GPU, onnxruntime runs the graph as written,
        and times are not measured.
    target : str or float
        What is accurate enough: ``"30dB"`` is the SQNR of the worst output; a number is the metric, by default the
        agreement of the worst output: top-1 of scores, the cosine of other outputs.
    metric : callable, optional
        As for :func:`compare`: the larger, the better.
    validation : iterable, optional
        Batches to measure on. By default every fourth of `batches` is held back from calibration for this; of fewer
        than four, all serve both purposes.
    max_seconds : float
        No further way is tried after this time. The first one and its verification always are.
    progress : bool
        Show bars on a terminal.
    **settings
        Of :func:`calibrate`.

    Returns
    -------
    Automatic
        ``quantized`` is the best model, ``verdict`` a sentence about it, ``rows()`` the table of all attempts, and
        ``next_steps`` says what to do next.

    Raises
    ------
    InvalidInputError
        As :func:`calibrate` and :func:`quantize`; for data that can be iterated only once, and an impossible target.
    ModelError
        If the engine cannot load or run the model.
    MissingDependencyError
        For "openvino" without openvino.

    Notes
    -----
    The model is calibrated once, and once more for each step that changes its weights. The methods are the criteria
    (entropy, max, percentile, mse, auto), then equalize, smooth and correct_bias, each on top of the best so far. With
    correct_bias, weights are rounded by AdaRound too. If the target is not reached by then, refine is tried, which is
    what :func:`quantize` does with `batches`: it chooses ranges by the outputs and leaves out at most a fifth of the
    layers.
    :func:`tune` goes on from here: it leaves out the layers that cost most until a target is reached.
    """
    end = time.perf_counter() + max_seconds
    check_engine(engine)
    check_limit(max_seconds)
    wanted, split = Target.parse(target), hold_back(from_reader(batches), from_reader(validation))
    prepared = prepare(model)
    calibration = calibrate(prepared, split.calibration, progress=progress, **settings)
    with open_reference(RunnableModel.of("model", model), split, engine, metric) as reference:
        tried = _Ways(prepared, split, settings, calibration, reference)
        samples, measure = reference.samples, reference.measure
        attempts, best, left_out = try_until(end, tried, wanted, samples, metric, progress=progress)
        chosen, quantized = tried.make(best.recipe)
    some = [batch for _, batch in zip(range(VERIFIED), split.validation, strict=False)]
    verification = verify(quantized, some, engine, float_model=prepared.model, progress=progress)
    _warn_of_floats(quantized)
    data = Data(calibration.num_batches, samples, split.calibration is not split.validation)
    size = reference.model.size
    return Automatic(quantized, chosen, attempts, best, wanted, measure, data, size, verification, left_out)


def _warn_of_floats(quantized: QDQModel) -> None:
    """Warn in one line of what stays in floating point: each attempt would have warned of it."""
    reasons = {name: reason for name, reason in quantized.skipped.items() if reason != FASTER}
    if reasons:
        name, reason = next(iter(reasons.items()))
        rest = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        warn(f"`{name}`{rest} in floating point: {reason}")


class _Ways:
    """A model that can be quantized in several ways, and measured: a ``Quantizable``."""

    criteria = (*CRITERIA, "auto")
    steps, last_steps = (*CHANGES, CORRECT_BIAS), (REFINE,)

    def __init__(
        self,
        prepared: Prepared,
        split: Split,
        settings: SettingsOptions,
        calibration: Calibration,
        reference: Reference,
    ) -> None:
        self._data, self._settings, self._reference = split.calibration, settings, reference
        self._bases: dict[tuple[str, ...], _Base] = {(): _Base(prepared, calibration, {})}
        self._layers = [node.name for node in prepared.graph.nodes if node.op_type in WEIGHTED]

    def attempt(self, recipe: Recipe) -> Attempt:
        """Quantize the model and compare it with the float model."""
        quantized, reference = self.make(recipe)[1], self._reference
        written = RunnableModel.of("int8 model", quantized.model)
        with running(written, reference.engine) as session:
            found = compared(reference, session, written.size)
        share = sum(name not in quantized.skipped for name in self._layers) / max(len(self._layers), 1)
        return Attempt.of(recipe, found, share)

    def make(self, recipe: Recipe) -> tuple[Calibration, QDQModel]:
        """Return the calibration and the model of a recipe; what warnings would say is measured."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            base = self._base(changes_of(recipe))
            prepared, thresholds = base.prepared, self._searched(base, recipe.criterion)
            calibration = base.calibration._replace(thresholds=thresholds)
            options = options_of(recipe, self._data, MIN_INT8)
            return calibration, quantize(prepared, calibration, engine=self._reference.engine, **options)

    def _searched(self, base: "_Base", criterion: Any) -> dict[str, LayerThreshold]:
        """Return the thresholds by a criterion; each is searched once."""
        if criterion not in base.thresholds:
            prepared, found, _ = base
            if criterion == "auto":
                base.thresholds[criterion] = auto_thresholds(prepared, found, self._data)
            else:
                base.thresholds[criterion] = found.search_thresholds(criterion=criterion)
        return base.thresholds[criterion]

    def _base(self, names: tuple[str, ...]) -> "_Base":
        """Return the float model after these changes, and its calibration; a step may find nothing to change."""
        if names not in self._bases:
            before = self._base(names[:-1])
            changed = prepare(CHANGES[names[-1]](before.prepared, self._data))
            if changed.model.SerializeToString() == before.prepared.model.SerializeToString():
                self._bases[names] = before
            else:
                self._bases[names] = _Base(changed, calibrate(changed, self._data, **self._settings), {})
        return self._bases[names]


class _Base(NamedTuple):
    """A float model, its calibration, and the thresholds by each criterion that was searched."""

    prepared: Prepared
    calibration: Calibration
    thresholds: dict[str, dict[str, LayerThreshold]]
