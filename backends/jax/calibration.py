"""From a JAX function and data to the thresholds of its activations."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax.numpy as jnp

from klquant.errors import InvalidInputError, KLQuantError, ModelError

from .. import collection
from ..batches import check_repeatable
from ..calibration import Calibration, Fingerprint
from ..collection import Run
from ..collection.checkpoint import open_checkpoint
from ..collection.distributed import Group, failing_together, share
from ..settings import CRITERIA, Criterion, CriterionOrAuto, Settings, SettingsOptions, check_choice
from ..warning import warn
from .accuracy.criterion_choice import auto_thresholds
from .description import NEVER_CALLED, Description, describe, settings_of
from .model.arguments import Function, inputs_of
from .observation.observer import JaxObserver

MAX_SPREAD = 32  # where the smallest iteration has 4 levels of 127


class Start(NamedTuple):
    """What is known before the first pass, the same in all processes."""

    blank: Calibration
    dtypes: dict[str, Any]
    """Of the operands to observe."""
    products: dict[str, str]
    """What identifies each product, by name."""


def calibrate(
    f: Function,
    params: Any,
    batches: Iterable[Any],
    *,
    criterion: CriterionOrAuto = "entropy",
    progress: bool = True,
    process_group: Group = None,
    resume: str | Path | None = None,
    checkpoint_seconds: float = 10.0,
    **settings: Unpack[SettingsOptions],
) -> Calibration:
    """Run a function over calibration data and choose the threshold of every activation that enters a product.

    Parameters
    ----------
    f : callable (params, *inputs)
        Any function that JAX can trace, in floating point. Products are ``dot_general`` and ``conv_general_dilated``.
    params : pytree
        Its parameters: a dict of arrays, a module of Equinox, a module or state of Flax, ...
    batches : iterable
        Calibration data: a list of batches, a DataLoader, ... It is iterated twice, once with ``passes=1``. A batch is
        the input, or a tuple or list of the inputs; arrays may be sharded over devices.
    criterion : {"entropy", "max", "percentile", "mse", "auto"}
        How T is chosen, see :func:`klquant.backends.thresholds.search_thresholds`. "auto" takes the best one for each
        tensor: with the least error of its product on the first 8 batches of each process.
    progress : bool
        Show bars on a terminal.
    process_group : JaxProcesses or torch.distributed.ProcessGroup, optional
        Processes that calibrate together, each on its part of the data; all return the same calibration.
    resume : path, optional
        File that keeps the statistics while they are collected. If it exists, the calibration resumes from it; the data
        must come in the same order. With several processes each adds its rank to the name.
    checkpoint_seconds : float
        Least time between two writes of that file.
    **settings
        Of :class:`klquant.backends.settings.Settings`, saved with the calibration: ``num_bins`` (odd, 4001),
        ``num_bits`` (8), ``guard`` (True; False is the literal entropy criterion), ``max_amax`` (a cap on the observed
        range), ``passes`` (2; 1 takes a one-shot stream), ``include`` and ``exclude`` (name patterns), ``overrides``
        (LayerOptions by name pattern), ``dead_channel`` (0.0).

    Returns
    -------
    Calibration
        By name of the activation: amax, histogram and threshold.

    Raises
    ------
    InvalidInputError
        For a function without products, an iterator (which can be iterated only once), no batches, NaN or infinity in
        an activation (naming layer and batch), other data in the second pass than in the first.
    ModelError
        If the function fails on a batch, naming it.

    Warns
    -----
    CalibrationWarning
        Naming the layer, as :func:`klquant.backends.thresholds.search_thresholds` does, and if its ranges differ much
        between the iterations of a loop.

    Notes
    -----
    A batch is one call of one jitted function, compiled once for each shape: smallest and largest values and counts
    are computed on the device, and cross to the host together. A product in the body of a scan or loop is one layer,
    with the statistics of all iterations. Counts are integers over bins that are the same everywhere, so results do
    not depend on the split of the data into batches, devices and processes; with "auto" they do, a little.
    """
    check_choice("criterion", criterion, (*CRITERIA, "auto"))
    if criterion == "auto":
        check_repeatable(batches, "pass a list or a DataLoader, or another criterion")
    first, batches = look_ahead(batches)
    start = begin(f, params, first, settings_of(settings), process_group)
    identity = {name: layer.digest for name, layer in start.blank.model.items()}, start.blank.settings.as_json()
    run = Run(progress, process_group, open_checkpoint(resume, identity, process_group, checkpoint_seconds))
    observer = JaxObserver(f, params, start.dtypes, start.products)
    initial: Criterion = "max" if criterion == "auto" else criterion  # its warnings are about the data alone
    found = with_uncalled(collection.calibrate(observer, batches, start.blank, criterion=initial, run=run), start)
    _warn_of_loops(observer.spreads)
    if criterion != "auto":
        return found
    data = None if first is None else batches
    return found._replace(thresholds=auto_thresholds(f, params, found, data, progress=progress, group=process_group))


def look_ahead(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """Return the first batch, or None, and an iterable of all batches."""
    if isinstance(batches, Iterator):
        first = next(batches, None)
        return first, chain([] if first is None else [first], batches)
    return next(iter(batches), None), batches


def begin(f: Function, params: Any, batch: Any, settings: Settings, group: Group = None) -> Start:
    """Return what a batch shows of a function; with several processes at least one must have a batch."""
    with failing_together(group):
        start = None if batch is None else _start(traced(f, params, batch), settings)
    shared = share(None if start is None else _as_json(start), group)
    if shared is None:
        raise InvalidInputError("expected at least one calibration batch, got none")
    return start if group is None and start is not None else _from_json(shared, settings)


def traced(f: Function, params: Any, batch: Any) -> Description:
    """Return what is known of a function; raise ModelError if it cannot be traced."""
    try:
        return describe(f, params, inputs_of(batch))
    except KLQuantError:
        raise
    except Exception as error:
        raise ModelError(f"the function cannot be traced, with {type(error).__name__}: {error}") from error


def with_uncalled(found: Calibration, start: Start) -> Calibration:
    """Return a calibration that names what was never called."""
    uncalled = {name: NEVER_CALLED for name in start.dtypes if name not in found.amax}
    return found._replace(skipped={**found.skipped, **uncalled})


def _start(description: Description, settings: Settings) -> Start:
    options = settings.resolve(description.dtypes)
    dtypes = {name: description.dtypes[name] for name in options}
    return Start(description.blank(settings), dtypes, description.program.products)


def _warn_of_loops(spreads: Mapping[str, float]) -> None:
    for name, spread in spreads.items():
        if spread > MAX_SPREAD:
            warn(
                f"layer `{name}`: its range differs by a factor of {spread:.0f} between the iterations of a loop, which"
                " share one T; unroll the loop, or exclude the layer"
            )


def _as_json(start: Start) -> list[Any]:
    blank = start.blank
    dtypes = {name: str(jnp.dtype(dtype)) for name, dtype in start.dtypes.items()}
    return [dtypes, start.products, blank.model, blank.skipped, dict(blank.weight_scales)]


def _from_json(shared: list[Any], settings: Settings) -> Start:
    dtypes, products, model, skipped, scales = shared
    blank = Calibration.of(settings)._replace(
        model={name: Fingerprint(*layer) for name, layer in model.items()}, skipped=skipped, weight_scales=scales
    )
    return Start(blank, {name: jnp.dtype(dtype) for name, dtype in dtypes.items()}, products)
