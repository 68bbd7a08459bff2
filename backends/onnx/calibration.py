"""From a float model and data to the thresholds of its activations."""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx

from klquant.errors import InvalidInputError

from ..calibration import Calibration
from ..settings import EXCLUDED, Criterion, Settings
from ..thresholds import search_thresholds
from .model.fingerprint import fingerprint
from .model.operators import observed_tensors
from .model.preparation import Prepared, prepare
from .qdq.grids import weight_scales
from .session import Providers, collect_amax, collect_histograms, open_session

logger = logging.getLogger("klquant")


def calibrate(
    model: onnx.ModelProto | str | Path | Prepared,
    batches: Iterable[Any],
    *,
    criterion: Criterion = "entropy",
    progress: bool = False,
    providers: Providers = ("CPUExecutionProvider",),
    **settings: Any,
) -> Calibration:
    """Run a model over calibration data and choose the threshold of every activation that may be quantized.

    Parameters
    ----------
    model : onnx.ModelProto, path or Prepared
        In floating point; see :func:`prepare`. It is not changed.
    batches : iterable
        Calibration data: a list of batches, a DataLoader, ... It is gone through twice. A batch is a mapping by input
        name, a tuple or list in the order of the inputs, or an array if there is one input; of NumPy or of what
        ``numpy.asarray`` takes, of any size where the model's is free.
    criterion : {"entropy", "max", "percentile", "mse"}
        How T is chosen, see :func:`klquant.backends.thresholds.search_thresholds`.
    progress : bool
        Show bars on a terminal.
    providers : sequence
        Of onnxruntime: where the model runs.
    **settings
        Of :class:`klquant.backends.settings.Settings`, saved with the calibration; names and patterns are those of
        tensors: ``num_bins`` (odd, 4001), ``num_bits`` (8), ``max_amax`` (204800, a cap on the observed range),
        ``include`` and ``exclude`` (patterns), ``overrides`` (LayerOptions by pattern).

    Returns
    -------
    Calibration
        By name of the tensor: amax, histogram and threshold.

    Raises
    ------
    InvalidInputError
        For an iterator (it can be gone through only once), no batches, a batch that does not fit the inputs (naming
        batch and input), NaN or infinity in a tensor (naming both), other data in the second pass than in the first.
    ModelError
        If onnxruntime fails on a batch, naming it.

    Warns
    -----
    CalibrationWarning
        Naming the tensor, as :func:`klquant.backends.thresholds.search_thresholds` does.

    Notes
    -----
    The counts are integers over ranges that are known before: neither the split of the data into batches nor their
    order shows, as far as the kernels of onnxruntime compute each sample alike in every batch. All observed
    tensors of one batch are in memory at a time, and of the batches before only a histogram of each.
    """
    chosen = _check(batches, criterion, settings)
    prepared = prepare(model)
    graph = prepared.graph
    tensors, scales = observed_tensors(graph), weight_scales(graph, chosen.num_bits)
    chosen.check_patterns(tensors)
    names = list(chosen.resolve(tensors))
    if not names:
        raise InvalidInputError(f"expected tensors that may be quantized, got none; {len(tensors)} are excluded")
    skipped = {name: EXCLUDED for name in tensors if name not in set(names)}
    found = Calibration.of(chosen)._replace(model=fingerprint(graph), skipped=skipped, weight_scales=scales)
    with open_session(prepared, names, providers) as observed:
        described = ("pass 1: ranges", "pass 2: histograms") if progress else ("", "")
        amax, number = collect_amax(observed, batches, described[0])
        logger.info("pass 1: the ranges of %d tensors in %d batches", len(names), number)
        amax = {name: min(value, chosen.max_amax) for name, value in amax.items()}
        histograms, again = collect_histograms(observed, batches, amax, chosen, described[1])
        logger.info("pass 2: %d histograms", len(histograms))
    if again != number:
        raise InvalidInputError(f"expected the {number} batches of pass 1, got {again} in pass 2")
    calls = dict.fromkeys(names, 1)
    found = found._replace(amax=amax, histograms=histograms, calls=calls, num_batches=number)
    return found._replace(thresholds=found.search_thresholds(criterion=criterion))


def _check(batches: Iterable[Any], criterion: Criterion, settings: dict[str, Any]) -> Settings:
    """Refuse what cannot be done before the model is run."""
    search_thresholds({}, {}, criterion=criterion)
    chosen = Settings.make(**settings)
    if isinstance(batches, Iterator):
        raise InvalidInputError(
            f"`batches` must be an iterable that can be gone through twice, got the one-shot {type(batches).__name__}; "
            "pass a list or a DataLoader"
        )
    if chosen.passes != 2:
        raise InvalidInputError(f"`passes` must be 2 for ONNX models, got {chosen.passes}")
    if chosen.observe != "inputs" or any(layer.observe for layer in chosen.overrides.values()):
        raise InvalidInputError("`observe` has no meaning for ONNX models: tensors are observed, by their own names")
    return chosen
