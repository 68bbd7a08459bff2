"""The stages of a calibration in their order: a class that knows which one a model has reached."""

import logging
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn

import klquant
from klquant.errors import InvalidInputError

from ..calibration import Calibration, checked
from ..collection import Run, collect_growing, collect_ranges, collect_resolved, to_calibration
from ..collection.checkpoint import open_checkpoint
from ..collection.distributed import Group, failing_together, share, warning_once
from ..collection.kept import KEEP_BYTES, Kept
from ..rounding import MAX_BATCHES
from ..settings import (
    EXCLUDED,
    CriterionOrAuto,
    Engine,
    LayerOptions,
    Settings,
    SettingsOptions,
    check_engine,
    matching,
)
from ..thresholds import LayerThreshold, candidate_thresholds, search_thresholds
from .accuracy.criterion_choice import choose_criterion
from .accuracy.diagnosis import Diagnosis, diagnose
from .correction.adaround import adapt_rounding
from .correction.bias_correction import correct_in_place
from .correction.equalization import Equalized, equalize_in_place, find_pairs
from .folding.api import Examination, copy_to_fold, examine_copy
from .folding.apply import Fold, fold_in_place
from .folding.replaced import check_replaced
from .folding.verify import verified_forward
from .model.calls import call_names, layer_of, separate_calls
from .model.edits import copy_model
from .model.forward import Forward, call_model, check_eval
from .model.layers import fingerprint, weighted_layers
from .model.plain import LayerTypes
from .model.products import Product, install
from .model.sums import without_orphans
from .observation.observer import TorchObserver
from .options import RunOptions
from .simulation import quantize_weights, simulate_in_place
from .stages import NEVER_CALLED, QuantizedModel, Source, Stage, check_layers, check_stage, warn_of_skipped

logger = logging.getLogger("klquant")
AUTO_BATCHES = 8  # on which criterion="auto" chooses


class Quantizer:
    """Take a model through the stages of calibration, one call each.

    The order is ``fold``, ``quantize_weights``, ``collect_amax``, ``collect_histograms``, ``search_thresholds``,
    ``simulate``; ``equalize`` may follow ``fold``. Calling a stage too early raises StageError, which names the missing
    stage. Repeating a stage discards the later ones. The given model never changes: ``fold`` copies it.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
    forward : callable (model, batch) -> output
        How to run the model on a batch. By default a tensor is the only argument, tuples and lists are positional
        arguments, and mappings are keyword arguments. Labels and entries that the model does not take are left out.
    progress : bool
        Show bars on a terminal or in a notebook.
    process_group : torch.distributed.ProcessGroup, optional
        Processes that calibrate together, each on its own part of the data; at least one must have data. All get the
        same thresholds. Every process must make the same calls.
    resume : path, optional
        File that keeps the statistics while they are collected. If it exists, the calibration resumes from it; the data
        must come in the same order. With several processes each adds its rank to the name.
    checkpoint_seconds : float
        Least time between two writes of that file.
    keep_bytes : int
        How many bytes of activations pass 1 may keep, on the model's device, so that pass 2 counts them without running
        the model again; 1 GiB by default, 0 keeps none. It is a fixed number, so that memory does not grow with the
        data. Results are the same.
    layer_types : mapping of module classes to functions, optional
        For classes that klquant does not know: the function takes a module and returns one that computes the same with
        plain layers, such as ``{MyConv: lambda m: m.as_conv2d()}``. Not saved: pass it to ``requantize``, too.
    engine : {"tensorrt", "onnxruntime", "openvino"}, optional
        The engine that will run the model. For "tensorrt" the shortcuts of residual sums are calibrated and rounded,
        for others none. Saved with the calibration, as the sums that were found.
    **settings
        Of :class:`klquant.backends.settings.Settings`, saved with the calibration: ``observe`` ("inputs": quantize what
        enters each layer, as engines do; "outputs": what leaves it), ``num_bins`` (odd, 4001), ``num_bits`` (8),
        ``guard`` (True; False is the literal entropy criterion), ``max_amax`` (a cap on the observed range), ``passes``
        (2; 1 takes an iterator, and counts over powers of three instead of amax), ``include`` and ``exclude`` (name
        patterns of layers), ``overrides`` (LayerOptions by name pattern).

    Attributes
    ----------
    stage : Stage
        The stage that the model has reached.
    """

    def __init__(  # noqa: PLR0913 the options of a calibration
        self,
        model: nn.Module,
        *,
        forward: Forward = call_model,
        progress: bool = True,
        process_group: Group = None,
        resume: str | Path | None = None,
        checkpoint_seconds: float = 10.0,
        keep_bytes: int = KEEP_BYTES,
        layer_types: LayerTypes | None = None,
        engine: Engine | None = None,
        **settings: Unpack[SettingsOptions],
    ) -> None:
        check_eval(model)
        if engine is not None:
            check_engine(engine)
        self.stage = Stage.LOADED
        self._model = model
        self._forward, self._run = forward, Run(progress, process_group, kept=Kept(keep_bytes))
        self._resume, self._checkpoint_seconds = resume, checkpoint_seconds
        self._layer_types, self._engine = layer_types, engine
        self._source = Source(forward)
        self._found = Calibration.of(Settings.make(**settings))

    @classmethod
    def from_calibration(cls, model: nn.Module, calibration: Calibration, **options: Unpack[RunOptions]) -> "Quantizer":
        """Return a quantizer at the stage that a calibration of this model has reached, without data.

        Raises InvalidInputError, naming the layers, for a calibration of another model.
        """
        quantizer = cls(model, **options, **checked(calibration).settings._asdict())
        calibration.check_fits(fingerprint(model))
        quantizer._fold(copy_to_fold(model, quantizer._layer_types), Examination.from_rows(calibration.transforms))
        quantizer._equalize([Equalized(**pair) for pair in calibration.transforms["equalize"]])
        quantizer.quantize_weights()
        quantizer._reached(Stage.CALIBRATED if calibration.thresholds else Stage.HISTOGRAMS_COLLECTED, calibration)
        return quantizer

    def fold(self, batch: Any = None) -> list[Fold]:
        """Fold BatchNorm and ReLU after a run on one batch; with several processes at least one must have a batch."""
        check_eval(self._model)
        with failing_together(self._run.group):
            model = copy_to_fold(self._model, self._layer_types)
            if self._layer_types and batch is not None:
                check_replaced(self._model, model, batch, self._forward, self._layer_types)
            seen = None if batch is None else examine_copy(model, batch, self._forward, self._engine)
        found = share(seen and [seen.as_rows(), seen.skipped], self._run.group)
        if found is None:
            raise InvalidInputError("expected at least one calibration batch, got none")
        return self._fold(model, Examination.from_rows(found[0])._replace(skipped=found[1]))

    def equalize(self, batch: Any = None) -> list[Equalized]:
        """Equalize the ranges of neighbouring layers after a run on one batch; see :func:`equalize`."""
        self._need(Stage.FOLDED)
        with failing_together(self._run.group):
            found = None if batch is None else find_pairs(self._folded, batch, self._forward)
        shared = share(found and [pair._asdict() for pair in found], self._run.group)
        return self._equalize([Equalized(**pair) for pair in shared or []])

    def quantize_weights(self) -> dict[str, torch.Tensor]:
        """Return the scale of each output channel of each layer's weights."""
        self._need(Stage.FOLDED)
        self._weight_scales = self._scales(self._found.settings)
        self._reached(Stage.WEIGHTS_QUANTIZED)
        return self._weight_scales

    def collect_amax(self, batches: Iterable[Any]) -> dict[str, float]:
        """Pass 1: return the range of every observed tensor. The weights are still in floating point."""
        self._need(Stage.WEIGHTS_QUANTIZED)
        if self._found.settings.passes == 1:
            raise InvalidInputError("`collect_amax` needs passes=2, got passes=1; call collect_histograms(batches)")
        self._ranges = collect_ranges(self._observer(), batches, run=self._resumable())
        self._reached(Stage.AMAX_COLLECTED, amax=self._ranges.amax)
        return self._ranges.amax

    def collect_histograms(self, batches: Iterable[Any]) -> dict[str, klquant.Histogram]:
        """Pass 2 over the same data, or the only pass: return the histogram of every observed tensor."""
        settings, ranges = self._found.settings, None
        self._need(Stage.WEIGHTS_QUANTIZED if settings.passes == 1 else Stage.AMAX_COLLECTED)
        observer, run = self._observer(), self._resumable()
        self._source = Source(self._forward, None if isinstance(batches, Iterator) else batches)
        if settings.passes == 1:
            logger.info("one pass: the bins divide a power of three instead of amax")
            counts = collect_growing(observer, batches, settings, run=run)
        else:
            ranges, counts = self._ranges, collect_resolved(observer, batches, self._found.amax, settings, run=run)
        self._reached(Stage.HISTOGRAMS_COLLECTED, to_calibration(counts, self._found, ranges=ranges))
        return self._found.histograms

    def search_thresholds(
        self,
        *,
        criterion: CriterionOrAuto = "entropy",
        num_bits: int | None = None,
        guard: bool | None = None,
        batches: Iterable[Any] | None = None,
    ) -> dict[str, LayerThreshold]:
        """Choose T for every observed tensor. It can be called again with another criterion, number of bits or guard.

        ``criterion="auto"`` chooses the best one for each tensor: with the least error of its layer's output on the
        first 8 of `batches`, see :func:`choose_criterion`.
        """
        self._need(Stage.HISTOGRAMS_COLLECTED)
        settings = self._found.settings.with_bits(num_bits)
        settings = settings._replace(guard=settings.guard if guard is None else guard)
        scales = self._scales(settings)
        options = settings.resolve(self._found.amax)
        if criterion == "auto":
            options, criterion = self._auto(options, scales, batches), "entropy"
        with warning_once(self._run.group):
            found = search_thresholds(
                self._found.amax,
                self._found.histograms,
                criterion=criterion,
                options=options,
                hidden=self._found.hidden,
                guard=settings.guard,
            )
        self._weight_scales = scales
        self._reached(Stage.CALIBRATED, settings=settings, thresholds=found)
        return found

    def simulate(self, *, exclude: Iterable[str] | str = ()) -> QuantizedModel:
        """Return a model that simulates INT8 inference, with everything that was found.

        Layers whose names match `exclude` stay in floating point.
        """
        self._need(Stage.CALIBRATED)
        patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        Settings.make(exclude=patterns).check_patterns(self._found.thresholds)
        return self._quantized(copy_model(self._folded), matching(self._found.thresholds, patterns))

    def correct_bias(self, quantized: QuantizedModel, batches: Iterable[Any]) -> QuantizedModel:
        """Return a result of :meth:`simulate` with biases corrected for rounding; see :func:`correct_bias`."""
        corrected = quantized._replace(model=copy_model(quantized.model))
        self._correct_in_place(corrected.model, batches)
        return corrected

    def adapt_rounding(self, quantized: QuantizedModel, batches: Iterable[Any]) -> QuantizedModel:
        """Return a result of :meth:`simulate` with weights rounded by AdaRound; see :func:`quantize`.

        Do this before biases are corrected. A saved calibration does not contain the rounding.
        """
        rounded = quantized._replace(model=copy_model(quantized.model))
        self._round_in_place(rounded.model, batches)
        return rounded

    def diagnose(self, batches: Iterable[Any], *, sensitivity: bool = True) -> Diagnosis:
        """Compare the quantized model with the float model, layer by layer; see :func:`diagnose`."""
        self._need(Stage.CALIBRATED)
        found = (self._folded, self._weight_scales, self._found.thresholds, batches)
        return diagnose(*found, sensitivity=sensitivity, **self._how_to_run())

    @property
    def calibration(self) -> Calibration:
        """Everything that was found so far, to save it; from the stage HISTOGRAMS_COLLECTED on."""
        self._need(Stage.HISTOGRAMS_COLLECTED)
        found = self._found
        known = {*found.amax, *found.skipped, *self._read}
        skipped = {**found.skipped, **{name: NEVER_CALLED for name in self._options if name not in known}}
        scales = {name: scale.tolist() for name, scale in self._weight_scales.items()}
        return found._replace(model=fingerprint(self._model), skipped=skipped, weight_scales=scales)

    def _collect(self, first: Any, batches: Iterable[Any], *, equalize: bool) -> None:
        """Take all stages up to HISTOGRAMS_COLLECTED; `first` is the first of the batches."""
        self.fold(first)
        if equalize:
            self.equalize(first)
        self.quantize_weights()
        if self._found.settings.passes == 2:
            self.collect_amax(batches)
        self.collect_histograms(batches)

    def _fold(self, model: nn.Module, seen: Examination) -> list[Fold]:
        fold_in_place(model, seen.folds)
        settings, names = self._found.settings, [name for name, _ in weighted_layers(model)]
        names += [name for product in seen.products for name in product.names]
        names = [call for name in names for call in call_names(name, seen.calls)]
        settings.check_patterns(names)
        self._folded = model
        chosen = without_orphans(settings.resolve(names), seen.products)
        names_left = [name for name in names if layer_of(name) not in seen.skipped]
        self._options = {name: chosen[name] for name in names_left if name in chosen}
        check_layers(self._options, names_left, seen.skipped)
        self._observe = {name: chosen.observe or settings.observe for name, chosen in self._options.items()}
        self._install(seen)
        self._verified, self._run = verified_forward(self._forward, seen.folds), self._run._replace(checkpoint=None)
        excluded = {name: EXCLUDED for name in names if name not in chosen}
        self._reached(Stage.FOLDED, transforms=seen.as_rows(), skipped={**seen.skipped, **excluded})
        return seen.folds

    def _install(self, seen: Examination) -> None:
        """Add points for products and taps for repeated calls, those that are not excluded."""
        chosen = {layer_of(name) for name in self._options}
        install(self._folded, [product for product in seen.products if not chosen.isdisjoint(product.names)])
        calls = {name: number for name, number in seen.calls.items() if name in chosen}
        separate_calls(self._folded, calls, self._observe)
        self._read = {name for product in seen.products for name in product.owners}

    def _equalize(self, pairs: list[Equalized]) -> list[Equalized]:
        equalize_in_place(self._folded, pairs)
        self._run = self._run._replace(checkpoint=None)
        transforms = {**self._found.transforms, "equalize": [pair._asdict() for pair in pairs]}
        self._reached(Stage.FOLDED, transforms=transforms)
        return pairs

    def _simulate_in_place(self) -> QuantizedModel:
        """Do what :meth:`simulate` does, without a copy: no stage can follow."""
        return self._quantized(self._folded)

    def _quantized(self, model: nn.Module, left_out: Collection[str] = ()) -> QuantizedModel:
        """Return the result with `model`, which is the folded one or a copy of it, quantized in place."""
        found, folds = self.calibration, [Fold(**fold) for fold in self._found.transforms["fold"]]
        kept = {name: layer for name, layer in found.thresholds.items() if name not in left_out}
        kept = without_orphans(kept, [Product(**row) for row in self._found.transforms.get("products", [])])
        left_out = [name for name in found.thresholds if name not in kept]
        found = found._replace(thresholds=kept, skipped={**found.skipped, **dict.fromkeys(left_out, EXCLUDED)})
        with warning_once(self._run.group):
            warn_of_skipped(found)
        simulate_in_place(model, self._weight_scales, found.thresholds, self._observe)
        return QuantizedModel(
            model, found.thresholds, self._weight_scales, found.histograms, folds, found.skipped, found, self._source
        )

    def _round_in_place(self, simulated: nn.Module, batches: Iterable[Any]) -> None:
        self._need_one_process("AdaRound")
        found = (self._folded, self._weight_scales, list(islice(batches, MAX_BATCHES)))
        adapt_rounding(simulated, *found, forward=self._forward, progress=self._run.progress)

    def _correct_in_place(self, simulated: nn.Module, batches: Iterable[Any]) -> None:
        self._need_one_process("bias correction")
        progress = self._run.progress
        correct_in_place(simulated, self._folded, batches, forward=self._forward, progress=progress)

    def _auto(
        self, options: dict[str, LayerOptions], scales: dict[str, torch.Tensor], batches: Iterable[Any] | None
    ) -> dict[str, LayerOptions]:
        """Return the options with the best criterion for each layer whose options name none."""
        chosen = None
        with failing_together(self._run.group):
            if batches is not None:
                candidates = candidate_thresholds(self._found.amax, self._found.histograms, options, self._found.hidden)
                some = list(islice(batches, AUTO_BATCHES))
                found = choose_criterion(self._folded, scales, candidates, some, **self._how_to_run())
                chosen = {name: choice.criterion for name, choice in found.items()}
        chosen = share(chosen, self._run.group)
        if chosen is None:
            raise InvalidInputError("criterion='auto' needs `batches`, got none")
        return {name: layer.over(LayerOptions(chosen.get(name))) for name, layer in options.items()}

    def _observer(self) -> TorchObserver:
        return TorchObserver(self._folded, self._observe, self._verified)

    def _resumable(self) -> Run:
        """Return how to make a pass, with a checkpoint of this model and its changes if one is wanted."""
        if self._resume is not None and self._run.checkpoint is None:
            model = {name: layer.digest for name, layer in fingerprint(self._model).items()}
            identity = (model, self._found.settings.as_json(), self._found.transforms)
            opened = open_checkpoint(self._resume, identity, self._run.group, self._checkpoint_seconds)
            self._run = self._run._replace(checkpoint=opened)
        return self._run

    def _scales(self, settings: Settings) -> dict[str, torch.Tensor]:
        options = settings.resolve(self._options)
        num_bits = {layer_of(name): chosen.num_bits or settings.num_bits for name, chosen in options.items()}
        return quantize_weights(self._folded, num_bits=num_bits, dead_channel=settings.dead_channel)

    def _how_to_run(self) -> dict[str, Any]:
        return {"observe": self._observe, "forward": self._forward, "progress": self._run.progress}

    def _need_one_process(self, what: str) -> None:
        if self._run.group is not None:
            raise InvalidInputError(f"{what} needs all data in one process, got a process group")

    def _need(self, stage: Stage) -> None:
        check_stage(self.stage, stage)

    def _reached(self, stage: Stage, found: Calibration | None = None, **new: Any) -> None:
        self.stage = stage
        if stage < Stage.CALIBRATED:
            new["thresholds"] = {}
        self._found = (found or self._found)._replace(**new)
        logger.info("stage %s reached", stage.name)
