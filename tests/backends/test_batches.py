"""Batches have numbers, and errors of the data name the batch."""

import io
from operator import length_hint

import pytest
from rich.console import Console
from rich.progress import Progress

from klquant.backends import batches
from klquant.backends.batches import check_repeatable, first_batches, numbered, tracked
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


@pytest.mark.parametrize("given", [None, len, 5])
@pytest.mark.parametrize("take", [lambda data: first_batches(data, None), lambda data: list(tracked(data, "")),
                                  lambda data: check_repeatable(data, "")])  # fmt: skip
def test_what_cannot_be_iterated_is_refused(given, take):
    with pytest.raises(InvalidInputError, match=f"`batches` must be an iterable .*, got {type(given).__name__}"):
        take(given)


# Bars


@pytest.fixture
def console(monkeypatch):
    """Return a list of options for the next console: what it writes goes to its file."""
    made = {"file": io.StringIO(), "force_terminal": False, "force_jupyter": False}
    monkeypatch.setattr(batches, "Console", lambda **_: Console(**made))
    return made


def shown(console, data=(1, 2)):
    assert list(tracked(data, "counting")) == list(data)
    return "counting" in console["file"].getvalue()


def test_bars_are_for_terminals(console):
    assert not shown(console)
    console["force_terminal"] = True
    assert shown(console)


@pytest.mark.parametrize("installed", [True, False])
def test_bars_are_for_notebooks_with_widgets(console, installed, monkeypatch):
    monkeypatch.setattr(batches, "find_spec", lambda name: object() if installed and name == "ipywidgets" else None)
    console["force_jupyter"] = True
    monkeypatch.setattr(batches, "Progress", lambda console: Progress(disable=True))  # rich would import the widgets
    assert (batches._console() is not None) == installed
    assert not shown(console)


def test_data_of_any_kind_of_length_get_a_bar(console):
    class Stream:
        def __iter__(self):
            return iter([1, 2])

        def __len__(self):
            raise NotImplementedError

    console["force_terminal"] = True
    assert shown(console, first_batches(range(9), 2))
    assert list(tracked(Stream(), "counting")) == [1, 2]


def test_the_first_batches_know_their_number():
    assert length_hint(first_batches([1, 2, 3], 2)) == length_hint(first_batches([1, 2], 3)) == 2
    assert [list(first_batches([1, 2, 3], 2)) for _ in "ab"] == [[1, 2]] * 2
    assert list(first_batches(iter([1, 2, 3]), 2)) == [1, 2]
