"""Batches have numbers, and errors of the data name the batch."""

import pytest

from klquant.backends.batches import numbered
from klquant.errors import InvalidInputError


def failing(error):
    yield from "ab"
    raise error


def test_batches_are_numbered():
    assert list(numbered(iter("abc"))) == [(0, "a"), (1, "b"), (2, "c")]


def test_an_error_of_the_data_passes_through_with_a_note():
    error = ConnectionError("lost")
    with pytest.raises(ConnectionError, match="lost") as caught:
        list(numbered(failing(error)))
    assert caught.value is error
    assert error.__notes__ == ["batch 2: the data raised this instead of yielding it"]


def test_an_error_of_klquant_names_the_batch_itself():
    with pytest.raises(InvalidInputError, match=r"^batch 2: `x\.npy` must be a NumPy file"):
        list(numbered(failing(InvalidInputError("`x.npy` must be a NumPy file"))))


def test_what_happens_with_a_batch_is_no_error_of_the_data():
    def divide():
        for number, _ in numbered("ab"):
            1 // number

    with pytest.raises(ZeroDivisionError) as caught:
        divide()
    assert not hasattr(caught.value, "__notes__")
