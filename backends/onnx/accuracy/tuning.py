"""Tune an ONNX model on its engine."""

import hashlib
import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import onnx

from klquant.errors import CalibrationWarning, ModelError

from ...accuracy.comparison import Metric, score_outputs
from ...accuracy.latency import interleaved_medians
from ...accuracy.outputs import Outputs
from ...accuracy.splits import Split, hold_back
from ...accuracy.trial_log import TrialLog
from ...accuracy.trials import Measured, Recipe, Target, Tuned
from ...accuracy.tuning import TuningOptions, split_options
from ...accuracy.tuning import tune as tune_shared
from ...batches import numbered, progress_bar
from ...calibration import Calibration
from ...settings import CRITERIA, WEIGHTED, Engine, SettingsOptions, check_engine
from ..calibration import calibrate
from ..correction.data import leading_samples
from ..execution import Session
from ..feeds import Array, from_reader
from ..model.preparation import Prepared, prepare
from ..placement import place
from ..qdq_model import QDQModel
from ..quantization import quantize
from .comparison import RunnableModel
from .criterion_choice import auto_thresholds
from .engine_sessions import Reference, open_reference, running
from .sensitivity import quantizer_costs, rank_layers
from .steps import CHANGES, CORRECT_BIAS, REFINE, changes_of, options_of

logger = logging.getLogger("klquant")
SECONDS = 0.5  # of a measurement of times
SAMPLES = 4  # of the data, on which the costs of quantizers are measured


def tune(
    model: onnx.ModelProto | str | Path | Prepared,
    batches: Iterable[Any],
    *,
    engine: Engine,
    target: str | float = 0.99,
    metric: Metric | None = None,
    validation: Iterable[Any] | None = None,
    progress: bool = True,
    resume: str | Path | None = None,
    **options: Unpack[TuningOptions],
) -> Tuned[QDQModel]:
    """Try settings, measure each on the engine, and stop at the first model that reaches a target.

    Parameters
    ----------
    model : onnx.ModelProto, path or Prepared
        A float model. It is not changed.
    batches : iterable
        Data in any form that :func:`calibrate` takes, to be iterated several times.
    engine : {"tensorrt", "onnxruntime", "openvino"}
        The engine that will run the model. For "tensorrt", which needs a GPU, onnxruntime runs the graph as written,
        and times are not measured.
    target : str or float
        ``"30dB"``: the SQNR of the worst output; or a number: the metric, by default the agreement of the worst output
        as :func:`compare` measures it, which is top-1 for scores and the cosine for other outputs.
    metric : callable, optional
        From the outputs of the float model and of the quantized one, each a list with one mapping of arrays by output
        name for each batch, to a number: the larger, the better.
    validation : iterable, optional
        Batches to measure on. By default every fourth of `batches` is held back from calibration for this; of fewer
        than four, all serve both purposes.
    progress : bool
        Show bars on a terminal or in a notebook.
    resume : path, optional
        JSON file that keeps the trials, written anew after each. If it exists, its trials are not repeated.
    **options
        ``max_runs`` (40), the largest number of quantized models to try; ``min_int8`` (0.8), the least share of Conv,
        ConvTranspose, Gemm and MatMul that stays in INT8; and the settings of :func:`calibrate`.

    Returns
    -------
    Tuned
        ``trace.reached`` says whether the target was reached. If not, the model is the most accurate one of all, so it
        is never worse than the first: ``criterion="entropy"`` and nothing else.

    Raises
    ------
    InvalidInputError
        For a target, share or number of runs that is impossible, data that can be iterated only once, a `resume` file
        of another tuning, and as :func:`calibrate` and :func:`quantize`.
    ModelError
        If the engine cannot load or run the model.
    MissingDependencyError
        For "openvino" without openvino.

    Notes
    -----
    The order is: the criteria, by themselves; each step on top of the best so far; the criteria again, with the steps
    that helped; refine, which is what :func:`quantize` does with `batches`, by itself and with these; then, without
    refine, layers are left out, those first that cost the outputs most for each layer lost. Doubling and bisection find
    how many, in about 2 log2(layers) trials. Layers that turn out to be harmless return to INT8. With the step
    correct_bias, weights are rounded by AdaRound too.

    The cost of each quantizer is measured on four samples: one run for each, of one session in which an input selects
    the only quantizer that rounds. Memory: the outputs of all validation batches of the float model, and with `metric`
    of one quantized model.
    """
    check_engine(engine)
    limits, settings = split_options(options)
    wanted, split = Target.parse(target), hold_back(from_reader(batches), from_reader(validation))
    prepared = prepare(model)
    with open_reference(RunnableModel.of("model", prepared.model), split, engine, metric) as reference:
        tuner = _OnnxTuner(prepared, split, settings, reference, limits.min_int8)
        log = TrialLog(resume, None if resume is None else tuner.identity())
        with progress_bar("tuning" if progress else "", range(limits.max_runs)) as advance:
            trace = tune_shared(tuner, wanted, limits, log, advance)
        calibration, quantized = tuner.make(trace.best.recipe)
        changed = tuner.changed(trace.best.recipe)
    return Tuned(quantized, calibration, trace, changed)


class _Base(NamedTuple):
    """A float model to quantize, and its calibration without thresholds."""

    prepared: Prepared
    calibration: Calibration


class _OnnxTuner:
    """A model that can be quantized in several ways and measured: a ``Tunable``."""

    criteria = (*CRITERIA, "auto")
    steps, last_steps = (*CHANGES, CORRECT_BIAS), (REFINE,)

    def __init__(
        self, prepared: Prepared, split: Split, settings: SettingsOptions, reference: Reference, min_int8: float
    ) -> None:
        self._prepared, self._split, self._settings, self._reference = prepared, split, settings, reference
        self._min_int8 = min_int8
        self._bases: dict[tuple[str, ...], _Base] = {}

    def measure(self, recipe: Recipe) -> Measured:
        """Quantize the model and compare it with the float model; one that the engine cannot run has no numbers."""
        try:
            return self._measured(self.make(recipe)[1])
        except ModelError as error:
            if recipe == Recipe(self.criteria[0]):
                raise
            logger.info("%s failed: %s", recipe, error)
            return Measured(math.nan, math.nan, math.nan, 0.0)

    def _measured(self, quantized: QDQModel) -> Measured:
        reference, names = self._reference, self._reference.model.outputs
        with running(reference.model._replace(model=quantized.model), reference.engine) as session:
            found: list[Outputs] = [session(names, feed) for feed in reference.feeds]
            ratio = self._time_ratio(session)
        score = score_outputs(reference.feeds, reference.outputs, found, reference.metric)
        return Measured(*score, ratio, self._int8_share(quantized))

    def _time_ratio(self, session: Session) -> float:
        reference, names = self._reference, self._reference.model.outputs
        if reference.engine == "tensorrt":
            return math.nan
        runs = [partial(run, names, reference.feeds[0]) for run in (reference.run, session)]
        float_ms, int8_ms = interleaved_medians(runs, seconds=SECONDS)
        return int8_ms / float_ms

    def _int8_share(self, quantized: QDQModel) -> float:
        layers = [node.name for node in self._prepared.graph.nodes if node.op_type in WEIGHTED]
        return sum(name not in quantized.skipped for name in layers) / max(len(layers), 1)

    def make(self, recipe: Recipe) -> tuple[Calibration, QDQModel]:
        """Return the calibration and the model of a recipe; what warnings would say is measured here."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            prepared, found = self._base(recipe)
            if recipe.criterion == "auto":
                thresholds = auto_thresholds(prepared, found, self._split.calibration, progress=False)
            else:
                thresholds = found.search_thresholds(criterion=recipe.criterion)  # type: ignore[arg-type]
            calibration = found._replace(thresholds=thresholds)
            options = options_of(recipe, self._split.calibration, self._min_int8)
            engine = self._reference.engine
            return calibration, quantize(prepared, calibration, engine=engine, exclude=recipe.exclude, **options)

    def changed(self, recipe: Recipe) -> onnx.ModelProto | None:
        """Return the float model that the calibration of a recipe fits, or None if no step changed the given one."""
        return self._base(recipe).prepared.model if changes_of(recipe) else None

    def _base(self, recipe: Recipe) -> _Base:
        """Return the float model after the steps that change it, and its calibration."""
        names = changes_of(recipe)
        if names not in self._bases:
            prepared, data = self._prepared, self._split.calibration
            for name in names:
                prepared = prepare(CHANGES[name](prepared, data))
            self._bases[names] = _Base(prepared, calibrate(prepared, data, progress=False, **self._settings))
        return self._bases[names]

    def rank(self, recipe: Recipe, min_int8: float) -> list[tuple[str, ...]]:
        """Return what to leave out of INT8, what costs most first."""
        plain = recipe._replace(steps=changes_of(recipe))
        prepared, engine = self._base(plain).prepared, self._reference.engine
        calibration, quantized = self.make(plain)
        feeds = leading_samples(prepared, self._feeds(), SAMPLES)
        floats = place(prepared, calibration, engine, plain.exclude).prepared
        costs = quantizer_costs(floats.graph, quantized.model, feeds)
        skipped = tuple(calibration.skipped)
        return rank_layers(prepared.graph, calibration.thresholds, engine, skipped, costs, min_int8=min_int8)

    def _feeds(self) -> Iterator[dict[str, Array]]:
        """Yield the data of the calibration."""
        model = self._reference.model
        return (model.feed(batch, f"batch {k}") for k, batch in numbered(self._split.calibration))

    def identity(self) -> object:
        """Return what the trials depend on."""
        digest = hashlib.sha256(self._prepared.model.SerializeToString())
        for feed in chain(self._feeds(), self._reference.feeds):
            for name, array in feed.items():
                digest.update(f"{name} {array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return (
            digest.hexdigest(),
            self._reference.engine,
            sorted(map(repr, self._settings.items())),
            self._reference.metric is None,
        )
