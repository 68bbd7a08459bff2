"""An ONNX model as the collector sees it: run in onnxruntime, one batch at a time."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx
import onnxruntime

from klquant.errors import InvalidInputError, KLQuantError, ModelError

from ..collection import Bins, Counted, KeptBatch, Observation, count, look
from ..collection.bins import BinsFor, extremes
from ..files import temporary_folder
from .feeds import Array, Input, make_feed, read_inputs
from .model.graph import copied
from .model.preparation import Prepared
from .model.saving import write_model
from .nonzeros import count_with_zeros, without_zeros

Providers: TypeAlias = Sequence[str | tuple[str, Mapping[str, Any]]]
THREADS = 2  # more would only wait for the memory


class OnnxObserver(NamedTuple):
    """A session and the tensors to observe: a :class:`klquant.backends.collection.ObservedModel`."""

    session: onnxruntime.InferenceSession
    inputs: list[Input]
    names: list[str]
    """Of the tensors."""
    pool: Executor
    """Looks for extremes in its threads: NumPy releases the interpreter's lock there, but not where it counts."""
    kind: str = "tensor"

    def observe(self, batch: Any, bins_for: BinsFor, number: int) -> dict[str, Observation]:
        """Run one batch; return what each tensor holds."""
        return self._look(self._run(self._feed(batch, f"batch {number}"), number), bins_for, number)

    def observe_and_keep(
        self, batch: Any, bins_for: BinsFor, number: int, room: int
    ) -> tuple[dict[str, Observation], KeptBatch | None]:
        """Run one batch; return what each tensor holds, and the tensors if there is room for them."""
        feed = self._feed(batch, f"batch {number}")
        tensors = self._run(feed, number)
        found = self._look(tensors, bins_for, number)
        ends = [(seen.low, seen.high) for seen in found.values()]
        own = (tensors[name].copy() if name in feed else tensors[name] for name in found)
        kept = dict(zip(found, self.pool.map(without_zeros, own, ends), strict=True))
        num_bytes = sum(tensor.values.nbytes for tensor in kept.values())
        return found, KeptBatch(kept, num_bytes) if num_bytes <= room else None

    def observe_kept(self, kept: KeptBatch, bins_for: BinsFor, number: int) -> dict[str, Observation]:
        """Return what each tensor of a batch holds, without a run."""
        return {
            name: _look(name, tensor.ends, functools.partial(count_with_zeros, tensor), bins_for, number)
            for name, tensor in kept.tensors.items()
        }

    def _look(self, tensors: dict[str, Array], bins_for: BinsFor, number: int) -> dict[str, Observation]:
        ends = self.pool.map(extremes, [tensors[name] for name in self.names])
        return {
            name: _look(name, both, functools.partial(count, tensors[name], ends=both), bins_for, number)
            for name, both in zip(self.names, ends, strict=True)
        }

    def _run(self, feed: dict[str, Array], number: int) -> dict[str, Array]:
        inner = [name for name in self.names if name not in feed]
        try:
            outputs = self.session.run(inner, feed)
        except Exception as error:
            raise ModelError(f"batch {number}: onnxruntime failed, with {type(error).__name__}: {error}") from error
        return feed | dict(zip(inner, outputs, strict=False))  # where none is asked for, all outputs come

    def digest(self, batch: Any) -> str:
        """Return a hash of the arrays in a batch."""
        digest = hashlib.sha256()
        for array in self._feed(batch, "`resume`").values():
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _feed(self, batch: Any, where: str) -> dict[str, Array]:
        with _located(where):
            return make_feed(batch, self.inputs)


def _look(
    name: str, ends: tuple[float, float], count_into: Callable[[Bins], Counted], bins_for: BinsFor, number: int
) -> Observation:
    with _located(f"tensor `{name}`, batch {number}"):
        return look(name, *ends, bins_for, count_into)


@contextmanager
def _located(where: str) -> Iterator[None]:
    try:
        yield
    except KLQuantError as error:
        raise type(error)(f"{where}: {error}") from error


@contextmanager
def open_session(prepared: Prepared, names: Sequence[str], providers: Providers) -> Iterator[OnnxObserver]:
    """Yield a prepared model as onnxruntime runs it, with these tensors as its outputs.

    One run for each batch returns all of them. onnxruntime optimizes around them: it keeps the outputs of a graph.
    """
    _check_providers(providers)
    model, graph = copied(prepared.model), prepared.graph
    inputs = read_inputs(model, graph)
    known = {*graph.inputs, *graph.outputs}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between the runs NumPy needs the cores
    with temporary_folder() as folder:
        path = write_model(model, folder / "observed.onnx")
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # onnxruntime has a dozen, with no common base
            raise ModelError(f"onnxruntime cannot load the model: {error}") from error
        with ThreadPoolExecutor(THREADS) as pool:
            yield OnnxObserver(session, inputs, list(names), pool)


def _check_providers(providers: Providers) -> None:
    """Raise InvalidInputError for a provider that onnxruntime would silently ignore."""
    available = onnxruntime.get_available_providers()
    for provider in providers:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            raise InvalidInputError(f"`providers` must be among {', '.join(available)}, got {name!r}")
