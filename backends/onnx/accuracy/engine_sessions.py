"""Sessions of models in the engine that they are measured on, and the float model to compare them with."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from klquant.errors import InvalidInputError

from ...accuracy.comparison import Comparison, Metric, compare_models, kind_of_agreement
from ...accuracy.outputs import Outputs, compare_outputs, count_samples
from ...accuracy.splits import Split
from ...batches import numbered
from ...settings import Engine
from ..execution import Feed, Session, open_onnxruntime
from .comparison import RunnableModel


class Reference(NamedTuple):
    """The float model, open in the engine to be timed, and its outputs on the data to measure on."""

    engine: Engine
    model: RunnableModel
    run: Session
    feeds: list[Feed]
    outputs: list[Outputs]
    metric: Metric | None

    @property
    def samples(self) -> int:
        """Return the number of samples to measure on."""
        return count_samples(self.feeds)

    @property
    def measure(self) -> str:
        """Return what the agreement is."""
        if self.metric is not None:
            return "metric"
        return kind_of_agreement(compare_outputs([(self.outputs[0], self.outputs[0])]))


@contextmanager
def running(model: RunnableModel, engine: Engine) -> Iterator[Session]:
    """Open a session in the engine; TensorRT's models run in onnxruntime as they are written."""
    if engine == "tensorrt":
        with open_onnxruntime(model.model, optimized=False) as session:
            yield session
    else:
        with model.running(engine) as session:
            yield session


@contextmanager
def open_reference(model: RunnableModel, split: Split, engine: Engine, metric: Metric | None) -> Iterator[Reference]:
    """Yield a float model with its outputs on the validation data; raise InvalidInputError for no data."""
    with running(model, engine) as run:
        feeds: list[Feed] = [model.feed(batch, f"validation batch {k}") for k, batch in numbered(split.validation)]
        if not feeds:
            raise InvalidInputError("expected at least one batch to measure on, got none")
        with model.exact() as exact:
            outputs: list[Outputs] = [exact(model.outputs, feed) for feed in feeds]
        yield Reference(engine, model, run, feeds, outputs, metric)


def compared(reference: Reference, session: Session, size: int) -> Comparison:
    """Return the comparison of a session, of a model of this size, with the float model."""
    names, timed = reference.model.outputs, reference.engine != "tensorrt"
    runs = [
        (lambda feed, one=one: one(names, feed[1])) if timed else (lambda feed: None)
        for one in (reference.run, session)
    ]
    found = compare_models(
        (lambda feed: reference.outputs[feed[0]], lambda feed: session(names, feed[1])),
        enumerate(reference.feeds),
        timed=runs,
        sizes=(reference.model.size, size),
        labels=None,
        metric=reference.metric,
    )
    return found if timed else found._replace(float_ms=math.nan, int8_ms=math.nan)
