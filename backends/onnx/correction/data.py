"""Batches as what a model takes, with errors that name the batch."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, tee
from typing import Any, TypeVar

from klquant.errors import InvalidInputError, ModelError

from ...batches import numbered
from ..execution import Feed, open_onnxruntime
from ..feeds import Array, few_samples, from_reader, make_feed, read_inputs
from ..model.preparation import Prepared

Batch = TypeVar("Batch")


def read_feeds(prepared: Prepared, batches: Iterable[Any]) -> Iterator[dict[str, Array]]:
    """Yield the arrays by input name; raise InvalidInputError for a batch that does not fit, and for no batches."""
    inputs, number = read_inputs(prepared.model, prepared.graph), -1
    for number, batch in numbered(from_reader(batches, once=True)):
        try:
            feed = make_feed(batch, inputs)
        except InvalidInputError as error:
            raise InvalidInputError(f"batch {number}: {error}") from error
        yield feed
    if number < 0:
        raise InvalidInputError("expected at least one batch, got none")


def halved(prepared: Prepared, feeds: list[dict[str, Array]]) -> list[dict[str, Array]]:
    """Return a single batch as two, if all inputs have as many samples and the model takes any number of them."""
    inputs = read_inputs(prepared.model, prepared.graph)
    free = all(wanted.shape is None or isinstance((*wanted.shape, 1)[0], str) for wanted in inputs)
    sizes = {array.shape[:1] for feed in feeds for array in feed.values()}
    if len(feeds) != 1 or not free or len(sizes) != 1 or (*min(sizes), 1)[0] < 2:
        return feeds
    half = min(sizes)[0] // 2
    halves = [{name: array[part] for name, array in feeds[0].items()} for part in (slice(half), slice(half, None))]
    return halves if _runs(prepared, halves[0]) else feeds


def _runs(prepared: Prepared, feed: Feed) -> bool:
    """Return whether the model takes a batch: constants inside may fix the number of samples."""
    try:
        with open_onnxruntime(prepared.model, optimized=False) as session:
            session(prepared.graph.outputs, feed)
    except ModelError:
        return False
    return True


def leading_samples(prepared: Prepared, feeds: Iterable[dict[str, Array]], limit: int) -> list[dict[str, Array]]:
    """Return so many samples from the start of the data; the last batch whole where the model fixes their number."""
    feeds, given = tee(feeds)
    found = few_samples(feeds, read_inputs(prepared.model, prepared.graph), limit)
    whole = list(islice(given, len(found)))
    cut = any(_shapes(few) != _shapes(feed) for few, feed in zip(found, whole, strict=True))  # only the last may be
    return whole if cut and not _runs(prepared, found[-1]) else found


def first_samples(prepared: Prepared, feeds: Sequence[Feed], limit: int) -> list[Feed]:
    """Return the first samples of each batch; all of them where inputs or constants of the model fix their number."""
    inputs = read_inputs(prepared.model, prepared.graph)
    found: list[Feed] = [few_samples([dict(feed)], inputs, limit)[0] for feed in feeds]
    shorter = (few for few, feed in zip(found, feeds, strict=True) if _shapes(few) != _shapes(feed))
    example = next(shorter, None)
    return found if example is None or _runs(prepared, example) else list(feeds)


def _shapes(feed: Feed) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in feed.items()}


def sampled(prepared: Prepared, feeds: Sequence[Feed], limit: int, samples: int) -> list[Feed]:
    """Return parts of up to `limit` of the batches, with about so many samples in all."""
    some = spread(feeds, limit)
    return first_samples(prepared, some, -(-samples // max(1, len(some))))


def spread(feeds: Sequence[Batch], limit: int) -> list[Batch]:
    """Return some of the batches, from the first to the last: a recording may begin with silence."""
    number = min(limit, len(feeds))
    return [feeds[k * len(feeds) // number] for k in range(number)]
