"""From a float model and data to the thresholds of its activations."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import onnx

from klquant.errors import InvalidInputError

from .. import collection
from ..batches import check_repeatable, first_batches
from ..calibration import Calibration
from ..collection import Run
from ..collection.checkpoint import open_checkpoint
from ..collection.distributed import Group
from ..collection.kept import KEEP_BYTES, Kept
from ..settings import CRITERIA, EXCLUDED, Criterion, CriterionOrAuto, Settings, SettingsOptions, check_choice
from .accuracy.criterion_choice import auto_thresholds
from .feeds import from_reader
from .model.fingerprint import fingerprint
from .model.graph import Graph
from .model.observed import MASKED, infinite_tensors, observed_tensors
from .model.preparation import Prepared, prepare
from .qdq.floats import body_layers
from .qdq.weights import weight_scales
from .session import OnnxObserver, Providers, open_session

CPU = ("CPUExecutionProvider",)


def calibrate(  # noqa: PLR0913 the options of a calibration
    model: onnx.ModelProto | str | Path | Prepared,
    batches: Iterable[Any],
    *,
    criterion: CriterionOrAuto = "entropy",
    num_batches: int | None = None,
    progress: bool = True,
    providers: Providers = CPU,
    process_group: Group = None,
    resume: str | Path | None = None,
    checkpoint_seconds: float = 10.0,
    keep_bytes: int = KEEP_BYTES,
    **settings: Unpack[SettingsOptions],
) -> Calibration:
    """Run a model over calibration data and choose the threshold of every activation that may be quantized.

    Parameters
    ----------
    model : onnx.ModelProto, path or Prepared
        In floating point; see :func:`prepare`. It is not changed.
    batches : iterable
        Calibration data: a list of batches, a DataLoader, ... It is iterated twice, once with ``passes=1``. A batch is
        a mapping by input name, a tuple or list in the order of the inputs, or an array if there is one input; of NumPy
        or of what ``numpy.asarray`` takes, of any size where the model's is free. onnxruntime's CalibrationDataReader
        works too: it is rewound before each pass, or kept in memory if it has no ``rewind``.
    criterion : {"entropy", "max", "percentile", "mse", "auto"}
        How T is chosen, see :func:`klquant.backends.thresholds.search_thresholds`. "auto" takes the best one for each
        tensor: with the least error behind the nodes that read it, on the first 8 samples (or batches, where the
        model fixes their size). That takes about as long as ten runs of the model on these.
    num_batches : int, optional
        Use only this many batches.
    progress : bool
        Show bars on a terminal or in a notebook.
    providers : sequence
        Of onnxruntime: where the model runs.
    process_group : torch.distributed.ProcessGroup, optional
        Processes that calibrate together, each on its part of the data; all return the same calibration.
    resume : path, optional
        File that keeps the statistics while they are collected. If it exists, the calibration resumes from it; the data
        must come in the same order. With several processes each adds its rank to the name.
    checkpoint_seconds : float
        Least time between two writes of that file.
    keep_bytes : int
        How many bytes of observed tensors pass 1 may keep in memory, so that pass 2 counts them without running the
        model again; 1 GiB by default, 0 keeps none. It is a fixed number, so that memory does not grow with the data.
        Results are the same.
    **settings
        Of :class:`klquant.backends.settings.Settings`, saved with the calibration; names and patterns are those of
        tensors: ``num_bins`` (odd, 4001), ``num_bits`` (8), ``guard`` (True; False is the literal entropy
        criterion), ``max_amax`` (a cap on the observed range), ``passes`` (2; 1 takes a one-shot stream), ``include``
        and ``exclude`` (patterns), ``overrides`` (LayerOptions by pattern), ``dead_channel`` (0.0; 1e-4 zeroes channels
        of weights below that).

    Returns
    -------
    Calibration
        By name of the tensor: amax, histogram and threshold.

    Raises
    ------
    InvalidInputError
        For an iterator (it can be iterated only once), no batches, a batch that does not fit the inputs (naming
        batch and input), NaN or infinity in a tensor (naming both), other data in the second pass than in the first.
    ModelError
        If onnxruntime fails on a batch, naming it.

    Warns
    -----
    CalibrationWarning
        Naming the tensor, as :func:`klquant.backends.thresholds.search_thresholds` does.

    Notes
    -----
    The counts are integers over ranges that are known beforehand. So results do not depend on batch size or order, as
    long as the kernels of onnxruntime compute a sample equally in every batch. Memory holds all observed tensors of one
    batch, up to `keep_bytes` of other batches, and one histogram for each tensor.
    """
    check_choice("criterion", criterion, (*CRITERIA, "auto"), "criteria")
    once = settings.get("passes", 2) == 1 and criterion != "auto"
    batches = first_batches(from_reader(batches, once=once), num_batches)
    prepared = prepare(model)
    blank = empty_calibration(prepared, **settings)
    identity = {name: layer.digest for name, layer in blank.model.items()}, blank.settings.as_json()
    checkpoint = open_checkpoint(resume, identity, process_group, checkpoint_seconds)
    run = Run(progress, process_group, checkpoint, Kept(keep_bytes))
    first: Criterion = "max" if criterion == "auto" else criterion  # its warnings are about the data alone
    if criterion == "auto":
        check_repeatable(batches, "pass a list or a DataLoader, or another criterion")
    with open_observer(prepared, providers=providers, **settings) as observer:
        found = collection.calibrate(observer, batches, blank, criterion=first, run=run)
    if criterion != "auto":
        return found
    thresholds = auto_thresholds(prepared, found, batches, progress=progress, group=process_group)
    return found._replace(thresholds=thresholds)


def empty_calibration(
    model: onnx.ModelProto | str | Path | Prepared, **settings: Unpack[SettingsOptions]
) -> Calibration:
    """Return what is known of a model before it has seen data, for :func:`klquant.backends.collection.to_calibration`.

    Parameters
    ----------
    model, **settings
        As for :func:`calibrate`.

    Returns
    -------
    Calibration
        With the settings, the fingerprint of the model, the scales of its weights and what is excluded.

    Raises
    ------
    InvalidInputError
        As for :func:`calibrate`.
    """
    chosen = _onnx_settings(settings)
    graph = prepare(model).graph
    tensors = observed_tensors(graph)
    if not tensors:
        _refuse_bodies(graph)
    names = set(_observed_names(tensors, chosen))
    excluded = [name for name in tensors if name not in names]
    return Calibration.of(chosen)._replace(
        model=fingerprint(graph),
        skipped=dict.fromkeys(infinite_tensors(graph), MASKED) | dict.fromkeys(excluded, EXCLUDED),
        weight_scales=weight_scales(graph, chosen.num_bits, chosen.dead_channel),
    )


@contextmanager
def open_observer(
    model: onnx.ModelProto | str | Path | Prepared, *, providers: Providers = CPU, **settings: Unpack[SettingsOptions]
) -> Iterator[OnnxObserver]:
    """Yield a model as :mod:`klquant.backends.collection` runs it, for passes over a part of the data.

    Parameters
    ----------
    model, providers, **settings
        As for :func:`calibrate`.

    Returns
    -------
    context manager of an :class:`~klquant.backends.collection.ObservedModel`

    Raises
    ------
    InvalidInputError, ModelError
        As for :func:`calibrate`.
    """
    chosen = _onnx_settings(settings)
    prepared = prepare(model)
    tensors = observed_tensors(prepared.graph)
    if not tensors:
        _refuse_bodies(prepared.graph)
    names = _observed_names(tensors, chosen)
    with open_session(prepared, names, providers) as observer:
        yield observer


def _refuse_bodies(graph: Graph) -> None:
    """Say where the layers are, if they all lie in bodies of branches and loops."""
    hosts = [f"{node.op_type} node `{node.name}`" for node in graph.nodes if any(body_layers(graph, node))]
    if hosts:
        raise InvalidInputError(
            f"expected tensors that may be quantized, got none: all operators with weights lie in the body of "
            f"{', '.join(hosts)}, and bodies are not quantized"
        )


def _observed_names(tensors: list[str], chosen: Settings) -> list[str]:
    chosen.check_patterns(tensors)
    names = list(chosen.resolve(tensors))
    if not names:
        raise InvalidInputError(f"expected tensors that may be quantized, got none; {len(tensors)} are excluded")
    return names


def _onnx_settings(settings: SettingsOptions) -> Settings:
    chosen = Settings.make(**settings)
    if chosen.observe != "inputs" or any(layer.observe for layer in chosen.overrides.values()):
        raise InvalidInputError("`observe` has no meaning for ONNX models: tensors are observed, by their own names")
    return chosen
