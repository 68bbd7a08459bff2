"""The passes over the calibration data, in onnxruntime: the range of every observed tensor, then its histogram."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx
import onnxruntime

import klquant
from klquant.errors import InvalidInputError, KLQuantError, ModelError

from ..batches import numbered, tracked
from ..files import temporary_folder
from ..settings import Settings
from .feeds import Array, Input, make_feed, read_inputs
from .model.graph import copied
from .model.preparation import Prepared
from .model.saving import write_model

Providers: TypeAlias = Sequence[str | tuple[str, Mapping[str, Any]]]
Observer: TypeAlias = Callable[[str, Array], None]
_DRIFT = 1.01  # kernels may round differently from pass to pass; different data exceed this


class Observed(NamedTuple):
    """A model that can be run, and what is looked at in it."""

    session: onnxruntime.InferenceSession
    inputs: list[Input]
    names: list[str]
    """Of the tensors."""


@contextmanager
def open_session(prepared: Prepared, names: Sequence[str], providers: Providers) -> Iterator[Observed]:
    """Yield a prepared model as onnxruntime runs it, with these tensors as its outputs.

    All of them are fetched in one run for each batch, and nothing is optimized: a tensor that is needed as it is
    cannot be fused away, and a second run for other tensors would cost as much as the first.
    """
    _check_providers(providers)
    model, graph = copied(prepared.model), prepared.graph
    inputs = read_inputs(model, graph)
    known = {*graph.inputs, *graph.outputs}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # errors are raised
    with temporary_folder() as folder:
        path = write_model(model, folder / "observed.onnx")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime has a dozen, with no common base
            raise ModelError(f"onnxruntime cannot load the model: {error}") from error
        yield Observed(session, inputs, list(names))


def _check_providers(providers: Providers) -> None:
    """Refuse what onnxruntime would pass over in silence."""
    available = onnxruntime.get_available_providers()
    for provider in providers:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            raise InvalidInputError(f"`providers` must be among {', '.join(available)}, got {name!r}")


def collect_amax(observed: Observed, batches: Iterable[Any], description: str = "") -> tuple[dict[str, float], int]:
    """Make pass 1: return the largest absolute value of every tensor, and the number of batches."""
    amax = dict.fromkeys(observed.names, 0.0)

    def see(name: str, tensor: Array) -> None:
        amax[name] = max(amax[name], largest(tensor))

    return amax, _go_through(observed, batches, see, description)


def collect_histograms(
    observed: Observed, batches: Iterable[Any], amax: Mapping[str, float], settings: Settings, description: str = ""
) -> tuple[dict[str, klquant.Histogram], int]:
    """Make pass 2: count every tensor over [-amax, amax]; tensors that are always 0 have no histogram."""
    found: dict[str, klquant.Histogram] = {}

    def see(name: str, tensor: Array) -> None:
        value = largest(tensor)
        if value > _DRIFT * amax[name] and amax[name] < settings.max_amax:
            raise InvalidInputError(f"expected the data of pass 1 with amax = {amax[name]}, got a value of {value}")
        if amax[name] > 0:
            counted = klquant.histogram(tensor, num_bins=settings.num_bins, amax=amax[name])
            found[name] = klquant.merge(found[name], counted) if name in found else counted

    return found, _go_through(observed, batches, see, description)


def largest(tensor: Array) -> float:
    """Return max |x|, 0 of nothing."""
    found = max(abs(float(tensor.min())), abs(float(tensor.max()))) if tensor.size else 0.0
    if not np.isfinite(found):
        raise InvalidInputError(f"activations must be finite, got {found}; exclude the tensor if that is meant")
    return found


def _go_through(observed: Observed, batches: Iterable[Any], see: Observer, description: str) -> int:
    """Run all batches and let every tensor be seen, one batch at a time; return how many there were."""
    number = -1
    for number, batch in numbered(tracked(batches, description)):
        _look(observed, batch, see, f"batch {number}")
    if number < 0:
        raise InvalidInputError("expected at least one calibration batch, got none")
    return number + 1


def _look(observed: Observed, batch: Any, see: Observer, where: str) -> None:
    """Run one batch; what it gives is free again when this returns."""
    with _located(where):
        feed = make_feed(batch, observed.inputs)
    inner = [name for name in observed.names if name not in feed]
    try:
        outputs = observed.session.run(inner, feed)
    except Exception as error:
        raise ModelError(f"{where}: onnxruntime failed, with {type(error).__name__}: {error}") from error
    tensors = feed | dict(zip(inner, outputs, strict=False))  # where none is asked for, all outputs come
    for name in observed.names:
        with _located(f"tensor `{name}`, {where}"):
            see(name, tensors[name])


@contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except KLQuantError as error:
        raise type(error)(f"{where}: {error}") from error
