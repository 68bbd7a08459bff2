"""The passes over the calibration data: the range of every observed tensor, then its histogram, or both in one."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

import klquant
from klquant.errors import InvalidInputError

from ...batches import tracked
from ...collection import Statistics, growing_histogram, join, nothing
from ...settings import MAX_AMAX, Settings
from ..model.forward import Forward, Where, call_model, run_observed
from ..model.layers import weighted_layers
from .checkpoint import Checkpoint, Progress, skip
from .distributed import Group, failing_together, join_all, total
from .statistics import observe_growing, observe_histogram, observe_range


class Run(NamedTuple):
    """How the model is run over the data."""

    observe: Where = "inputs"
    forward: Forward = call_model
    progress: bool = False
    group: Group = None
    """Processes that calibrate together."""
    checkpoint: Checkpoint | None = None


class Pass(NamedTuple):
    """What a pass over the data of all processes found."""

    statistics: Statistics
    num_batches: int


def collect_amax(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    observe: Where = "inputs",
    max_amax: float = MAX_AMAX,
    forward: Forward = call_model,
    progress: bool = False,
) -> dict[str, float]:
    """Pass 1: find the largest absolute value of every observed tensor.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
    batches : iterable
        Tensors, tuples or mappings of tensors, of any batch size.
    observe : {"inputs", "outputs"}, or a mapping of layer names to these
        Whether to look at what enters each quantized layer, or at what leaves it (after its folded ReLU). Of a
        mapping, layers that it lacks are not observed.
    max_amax : float
        Larger values are capped to this.
    forward : callable (model, batch) -> output
        How to run the model on a batch.
    progress : bool
        Show a bar on a terminal.

    Returns
    -------
    dict
        amax by qualified layer name, in units of the activation; layers that were never called are missing.

    Raises
    ------
    InvalidInputError
        For NaN or infinity (named with layer and batch), no batches, a model in training mode.
    ModelError
        If the model fails on a batch; its own error is the cause.
    """
    if not max_amax > 0:
        raise InvalidInputError(f"`max_amax` must be positive, got {max_amax}")
    found = ranges(model, batches, Run(observe, forward, progress)).statistics
    return capped(found.amax, max_amax)


def collect_histograms(
    model: nn.Module,
    batches: Iterable[Any],
    amax: Mapping[str, float],
    *,
    observe: Where = "inputs",
    num_bins: int = 4001,
    max_amax: float = MAX_AMAX,
    forward: Forward = call_model,
    progress: bool = False,
) -> dict[str, klquant.Histogram]:
    """Pass 2: count every observed tensor into bins over [-amax, amax].

    Parameters
    ----------
    model, batches, observe, max_amax, forward, progress
        As for :func:`collect_amax`, with the same data.
    amax : mapping
        The result of pass 1.
    num_bins : int, odd

    Returns
    -------
    dict
        A Histogram of NumPy arrays by qualified layer name; tensors that are always 0 have none.

    Raises
    ------
    InvalidInputError
        If the data are not those of pass 1: a layer without amax, or values beyond it.
    ModelError
        If the model fails on a batch.
    """
    settings = Settings(num_bins=num_bins, max_amax=max_amax)
    found = counts(model, batches, amax, settings, Run(observe, forward, progress)).statistics
    return with_edges(found, amax)


def ranges(model: nn.Module, batches: Iterable[Any], run: Run) -> Pass:
    """Make pass 1."""
    return _go_through(model, batches, observe_range, "ranges", "pass 1: ranges", run)


def counts(model: nn.Module, batches: Iterable[Any], amax: Mapping[str, float], settings: Settings, run: Run) -> Pass:
    """Make pass 2, over the ranges of pass 1."""
    see = functools.partial(observe_histogram, amax=amax, num_bins=settings.num_bins, max_amax=settings.max_amax)
    over = hashlib.sha256(repr(sorted(amax.items())).encode()).hexdigest()  # counts over other ranges do not add up
    return _go_through(model, batches, see, f"counts over {over}", "pass 2: histograms", run)


def growing_counts(model: nn.Module, batches: Iterable[Any], settings: Settings, run: Run) -> Pass:
    """Make the only pass: ranges that grow by powers of three, with bins enough that two thirds may be cut off."""
    see = functools.partial(observe_growing, num_bins=3 * settings.num_bins, max_amax=settings.max_amax)
    return _go_through(model, batches, see, "growing counts", "one pass: histograms", run)


def capped(amax: Mapping[str, float], max_amax: float) -> dict[str, float]:
    """Return the ranges, none beyond the cap."""
    return {name: min(value, max_amax) for name, value in amax.items()}


def with_edges(found: Statistics, amax: Mapping[str, float]) -> dict[str, klquant.Histogram]:
    """Return the histograms of pass 2."""
    empty = torch.zeros(0).numpy()
    return {
        name: klquant.Histogram(hist, klquant.histogram(empty, num_bins=len(hist), amax=amax[name]).edges)
        for name, hist in found.hist.items()
    }


def cut_to_range(found: Statistics, max_amax: float) -> dict[str, klquant.Histogram]:
    """Return the histograms of the only pass."""
    return {name: growing_histogram(found, name, max_amax) for name in found.hist}


def _go_through(
    model: nn.Module,
    batches: Iterable[Any],
    see: Callable[[Statistics, str, torch.Tensor], None],
    key: str,
    description: str,
    run: Run,
) -> Pass:
    """Collect statistics batch by batch, from where the checkpoint stands, and join those of all processes."""
    checkpoint = run.checkpoint or Checkpoint()
    done, batch = checkpoint.start(key), nothing()

    def observer(name: str, tensor: torch.Tensor) -> None:
        see(batch, name, tensor)

    def after_batch(item: Any) -> None:
        nonlocal done, batch
        done = Progress(join(done.statistics, batch), done.num_batches + 1, checkpoint.digest(item))
        checkpoint.keep(key, done)
        batch = nothing()

    with failing_together(run.group):
        remaining = skip(tracked(batches, description if run.progress else ""), done)
        try:
            options: dict[str, Any] = {"observe": run.observe, "forward": run.forward}
            run_observed(model, remaining, observer, after_batch=after_batch, first=done.num_batches, **options)
        finally:
            checkpoint.write()
    found = join_all(done.statistics, [name for name, _ in weighted_layers(model)], run.group)
    num_batches = total(done.num_batches, run.group)
    if num_batches == 0:
        raise InvalidInputError("expected at least one calibration batch, got none")
    checkpoint.finish(key)
    return Pass(found, num_batches)
