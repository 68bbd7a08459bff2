"""Batches as what a model takes, with errors that name the batch."""

from collections.abc import Iterable, Iterator
from typing import Any

from klquant.errors import InvalidInputError

from ...batches import numbered
from ..feeds import Array, from_reader, make_feed, read_inputs
from ..model.preparation import Prepared


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
