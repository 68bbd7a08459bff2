import inspect

import numpy as np
import pytest

import klquant
from klquant import errors


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (klquant.ArrayTypeError, TypeError),
        (klquant.InvalidInputError, ValueError),
        (klquant.InfeasibleError, ValueError),
        (klquant.StageError, RuntimeError),
        (klquant.MissingDependencyError, ImportError),
    ],
)
def test_each_error_is_caught_by_its_builtin_and_by_the_base(error, builtin):
    for caught_as in (error, builtin, klquant.KLQuantError):
        with pytest.raises(caught_as, match="what went wrong"):
            raise error("what went wrong")


def test_an_infeasible_histogram_is_told_from_an_invalid_one():
    assert not issubclass(klquant.InfeasibleError, klquant.InvalidInputError)
    assert not issubclass(klquant.InvalidInputError, klquant.InfeasibleError)


def test_the_warning_can_be_filtered_as_a_user_warning():
    assert issubclass(klquant.CalibrationWarning, UserWarning)
    assert not issubclass(klquant.CalibrationWarning, klquant.KLQuantError)


def test_every_error_class_is_public_and_documented():
    classes = inspect.getmembers(errors, inspect.isclass)
    assert {name for name, _ in classes} <= set(klquant.__all__)
    assert all(inspect.getdoc(error) for _, error in classes)


def test_both_kinds_of_except_work_on_what_functions_raise():
    for caught_as in (ValueError, klquant.KLQuantError):
        with pytest.raises(caught_as, match="one-dimensional"):
            klquant.smooth(np.ones((2, 2)))
    for caught_as in (TypeError, klquant.KLQuantError):
        with pytest.raises(caught_as, match="got list"):
            klquant.smooth([1, 2])
