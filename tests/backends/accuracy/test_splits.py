import pytest

import klquant
from klquant.backends.accuracy.splits import hold_back


class Anew:
    """An iterable without a length."""

    def __iter__(self):
        return iter(range(9))


@pytest.mark.parametrize("batches", [list(range(9)), Anew()], ids=["sequence", "iterable"])
def test_every_fourth_batch_is_held_back(batches):
    split = hold_back(batches, None)
    for _ in range(2):
        assert list(split.validation) == [3, 7]
        assert list(split.calibration) == [0, 1, 2, 4, 5, 6, 8]


def test_of_few_batches_all_serve_both_purposes():
    assert hold_back([1, 2, 3], None) == ([1, 2, 3], [1, 2, 3])


def test_given_validation_is_taken():
    assert hold_back([1, 2, 3, 4, 5], [6]) == ([1, 2, 3, 4, 5], [6])


@pytest.mark.parametrize(("batches", "validation"), [(iter([1]), None), ([1], iter([1]))])
def test_iterators_are_refused(batches, validation):
    with pytest.raises(klquant.InvalidInputError, match="can be iterated twice"):
        hold_back(batches, validation)
