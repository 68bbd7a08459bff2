"""Laws that a function must keep, whatever its result is: assertions that call your function."""

from collections.abc import Callable
from typing import Any

import numpy as np

from klquant.testing.oracles import assert_nearest_levels

Function = Callable[[Any], Any]


def assert_symmetric(function: Function, x: Any) -> None:
    """Assert ``function(-x) == -function(x)``.

    Parameters
    ----------
    function : callable
        Your quantizer, from an array to an array of its shape.
    x : array

    Raises
    ------
    AssertionError
        If a value differs.
    """
    np.testing.assert_array_equal(_numbers(function(-x)), -_numbers(function(x)), err_msg="symmetry about 0")


def assert_monotone(function: Function, x: Any) -> None:
    """Assert that larger values never have smaller results.

    Parameters
    ----------
    function : callable
        Your quantizer, from an array to an array of its shape.
    x : array, shape (n,)
        In any order.

    Raises
    ------
    AssertionError
        If a result decreases.
    """
    ordered = x[np.argsort(_numbers(x), kind="stable")]
    falls = np.flatnonzero(np.diff(_numbers(function(ordered))) < 0)
    assert not falls.size, f"must not decrease from {ordered[falls[0]]} to {ordered[falls[0] + 1]}"


def assert_idempotent(function: Function, x: Any) -> None:
    """Assert ``function(function(x)) == function(x)``, as for values that are already quantized.

    Parameters
    ----------
    function : callable
        From an array to an array of its shape.
    x : array

    Raises
    ------
    AssertionError
        If a value changes the second time.
    """
    once = function(x)
    np.testing.assert_array_equal(_numbers(function(once)), _numbers(once), err_msg="applied twice")


def assert_monoid(add: Callable[[Any, Any], Any], a: Any, b: Any, c: Any, *, zero: Any = None) -> None:
    """Assert that an addition, of histograms for example, does not depend on order or grouping.

    Parameters
    ----------
    add : callable
        Of two arguments.
    a, b, c : arrays, or tuples of arrays
    zero : same type, optional
        The neutral element.

    Raises
    ------
    AssertionError
        If two orders differ, or adding `zero` changes something.
    """
    _assert_same(add(add(a, b), c), add(a, add(b, c)), "grouping")
    _assert_same(add(a, b), add(b, a), "order")
    if zero is not None:
        _assert_same(add(a, zero), a, "the neutral element")


def assert_fake_quantizer(
    function: Function, x: Any, scale: float, *, num_quantized_bins: int = 255, tolerance: float = 1e-4
) -> None:
    """Assert all that a symmetric fake quantizer promises.

    Its values are the nearest levels times the scale; it saturates; it is odd, monotone and idempotent; it keeps the
    shape and the dtype, and does not change its argument.

    Parameters
    ----------
    function : callable
        From an array to the array of its real quantized values.
    x : array, shape (n,)
        Without NaN.
    scale : float, positive
        Step between two levels.
    num_quantized_bins : int, odd, at least 3
    tolerance : float, in steps
        How far a value may be from a level times the scale, and from half-way where either level is right.

    Raises
    ------
    AssertionError
        If it breaks one of these.
    """
    before = np.array(_numbers(x))
    real = function(x)
    np.testing.assert_array_equal(_numbers(x), before, err_msg="the argument")
    assert (real.shape, real.dtype) == (x.shape, x.dtype), (
        f"expected {x.dtype} of shape {tuple(x.shape)}, got {real.dtype} of shape {tuple(real.shape)}"
    )
    levels = np.rint(_numbers(real) / scale)
    np.testing.assert_allclose(
        _numbers(real) / scale, levels, rtol=0, atol=tolerance, equal_nan=False, err_msg="off the levels"
    )
    assert_nearest_levels(levels, before, scale, num_quantized_bins=num_quantized_bins, tolerance=tolerance)
    for law in (assert_symmetric, assert_monotone, assert_idempotent):
        law(function, x)


def _numbers(x: Any) -> "np.ndarray[Any, np.dtype[np.float64]]":
    return np.asarray(x, np.float64)


def _assert_same(found: Any, expected: Any, what: str) -> None:
    if isinstance(found, tuple):
        for one, other in zip(found, expected, strict=True):
            _assert_same(one, other, what)
        return
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), err_msg=what)
