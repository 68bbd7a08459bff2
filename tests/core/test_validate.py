"""Every bad input raises an error that says what was expected and what was given."""

import contextlib

import numpy as np
import pytest

import klquant
from klquant import ArrayTypeError, InfeasibleError, InvalidInputError
from klquant._validate import LARGEST, SMALLEST, check_odd, check_positive, check_vector
from support.cases import even_edges
from support.namespaces import JAX, JIT, import_torch, needs_jax

SEARCHES = [klquant.optimal_threshold, klquant.divergence_curve]
HIST, EDGES = [1, 3, 9, 1, 7, 4, 2], even_edges(7)


def with_entry(values, index, entry):
    """Return the values as float64 with one of them replaced."""
    array = np.array(values, np.float64)
    array[index] = entry
    return array


BAD_SHAPES = {
    "even number of bins": (HIST[:6], even_edges(6), r"`hist` must have an odd number of bins, got 6"),
    "too few bins": ([1], even_edges(1), r"`hist` must have at least num_quantized_bins = 3 bins, got 1"),
    "edges too short": (HIST, EDGES[:-1], r"`edges` must have shape \(8,\), one more than `hist`, got \(7,\)"),
    "edges too long": (HIST, even_edges(8), r"`edges` must have shape \(8,\), .* got \(9,\)"),
    "edges in two dimensions": (HIST, EDGES[None], r"`edges` must have shape \(8,\), .* got \(1, 8\)"),
    "scalar": (5, EDGES, r"`hist` must have shape \(..., num_bins\) and not be empty, got \(\)"),
    "no bins": (np.zeros(0), np.zeros(1), r"`hist` must have shape \(..., num_bins\) and not be empty, got \(0,\)"),
    "no histograms": (
        np.zeros((0, 7)),
        EDGES,
        r"`hist` must have shape \(..., num_bins\) and not be empty, got \(0, 7\)",
    ),
    "edges of another batch": (
        [HIST] * 2,
        [EDGES] * 3,
        r"`edges` must have shape \(8,\), one more than `hist`, got \(3, 8\)",
    ),
}
BAD_VALUES = {
    "NaN": (with_entry(HIST, 2, np.nan), EDGES, r"`hist` must be finite, got nan at index 2"),
    "infinite": (with_entry(HIST, 4, np.inf), EDGES, r"`hist` must be finite, got inf at index 4"),
    "negative count": ([1, 3, -9, 1, 7, 4, 2], EDGES, r"`hist` must not be negative, got -9 at index 2"),
    "negative weight": (with_entry(HIST, 6, -0.5), EDGES, r"`hist` must not be negative, got -0.5 at index 6"),
    "counts of 2**63": (
        np.array([2**62, 0, 0, 0, 0, 0, 2**62]),
        EDGES,
        r"`hist` must have a total below 2\*\*63, got about 9.223e\+18",
    ),
    "unsigned counts of 2**63": (
        np.array([2**63, 0, 0, 0, 0, 0, 0], np.uint64),
        EDGES,
        r"`hist` must have a total below 2\*\*63, got about 9.223e\+18",
    ),
    "weights of 2**63": (np.full(7, 2.0**61), EDGES, r"`hist` must have a total below 2\*\*63, got about 1.614e\+19"),
    "one of several": ([HIST, [*HIST[:2], -9, *HIST[3:]]], EDGES, r"must not be negative, got -9 at index \(1, 2\)"),
    "one of several of 2**63": (
        np.array([HIST, [2**62, 0, 0, 0, 0, 0, 2**62]]),
        EDGES,
        r"`hist` must have a total below 2\*\*63, got about 9.223e\+18",
    ),
    "falling edges": (HIST, EDGES[::-1], r"`edges` must be finite and strictly increasing, got 3.5, 2.5 at index 0"),
    "equal edges": (HIST, with_entry(EDGES, 3, 0.5), r"strictly increasing, got 0.5, 0.5 at index 3"),
    "NaN among the edges": (HIST, with_entry(EDGES, 5, np.nan), r"`edges` must be finite .* got 0.5, nan at index 4"),
    "infinite edges": (HIST, with_entry(EDGES, 7, np.inf), r"`edges` must be finite .* got 2.5, inf at index 6"),
    "edges whose squares overflow": (
        HIST,
        EDGES * 1e150,
        r"`edges` must end between 1e-140 and 1e\+?140, got 3.5e\+150",
    ),
    "edges whose squares vanish": (HIST, EDGES * 1e-150, r"`edges` must end between 1e-140 and 1e\+?140, got 3.5e-150"),
    "shifted edges": (HIST, EDGES + 1, r"`edges` must be symmetric about 0, got -2.5 and 4.5 at 0 from the ends"),
    "shifted so far that sums overflow": (HIST, np.linspace(1e308, 1.7e308, 8), r"`edges` must be symmetric about 0"),
    "one of several shifted": (
        [HIST, HIST],
        np.stack(
            [with_entry(EDGES * 1e6, 0, -3.5e6 + 0.75), EDGES + 0.25]
        ),  # the first by less than a millionth of a bin
        r"`edges` must be symmetric about 0, got -3.25 and 3.75 at \(1, 0\) from the ends",
    ),
    "one of several too wide": (
        [HIST, HIST],
        np.stack([EDGES, EDGES * 1e150]),
        r"`edges` must end between 1e-140 and 1e\+?140, got 3.5e\+150",
    ),
    "one side stretched": (HIST, with_entry(EDGES, 7, 4.0), r"must be symmetric about 0, got -3.5 and 4.0 at 0"),
}
BAD_TYPES = {
    "complex": (np.ones(7, complex), EDGES, r"`hist` must hold real numbers, got dtype complex128"),
    "boolean": (np.ones(7, bool), EDGES, r"`hist` must hold real numbers, got dtype bool"),
    "complex edges": (HIST, EDGES.astype(complex), r"`edges` must hold real numbers, got dtype complex128"),
}


def table(cases):
    return pytest.mark.parametrize(("hist", "edges", "message"), cases.values(), ids=cases.keys())


@pytest.mark.parametrize("search", SEARCHES)
@table(BAD_SHAPES)
def test_bad_shapes_are_refused_under_jit_too(xp, search, hist, edges, message):
    with pytest.raises(InvalidInputError, match=message):
        xp.call(search, xp.asarray(hist), xp.asarray(edges), num_quantized_bins=3)


@pytest.mark.parametrize("search", SEARCHES)
@table(BAD_TYPES)
def test_bad_types_are_refused_under_jit_too(xp, search, hist, edges, message):
    with pytest.raises(ArrayTypeError, match=message):
        xp.call(search, xp.asarray(hist), xp.asarray(edges), num_quantized_bins=3)


@pytest.mark.parametrize("search", SEARCHES)
@table(BAD_VALUES)
def test_bad_values_are_refused_where_they_are_concrete(eager, search, hist, edges, message):
    with pytest.raises(InvalidInputError, match=message):
        search(eager.asarray(hist), eager.asarray(edges), num_quantized_bins=3)


@needs_jax
@pytest.mark.parametrize("edges", [EDGES[::-1].copy(), EDGES + 1])
def test_bad_edges_raise_no_error_under_jit(edges):
    hist = JIT.asarray(HIST)
    curve = JIT.call(klquant.divergence_curve, hist, JIT.asarray(edges), num_quantized_bins=3)
    assert np.isnan(curve).all()


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        (4, InvalidInputError, r"`num_quantized_bins` must be odd and at least 3, got 4"),
        (1, InvalidInputError, r"`num_quantized_bins` must be odd and at least 3, got 1"),
        (-3, InvalidInputError, r"`num_quantized_bins` must be odd and at least 3, got -3"),
        (9, InvalidInputError, r"at least num_quantized_bins = 9 bins, got 7"),
        (3.0, ArrayTypeError, r"`num_quantized_bins` must be an int, got float"),
        (True, ArrayTypeError, r"`num_quantized_bins` must be an int, got bool"),
    ],
)
def test_bad_numbers_of_levels_are_refused(xp, search, levels, error, message):
    with pytest.raises(error, match=message):
        xp.call(search, xp.asarray(HIST), xp.asarray(EDGES), num_quantized_bins=levels)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("eps", [0.0, -1e-4, float("nan"), float("inf")])
def test_bad_eps_is_refused(xp, search, eps):
    with pytest.raises(InvalidInputError, match=rf"`eps` must be positive and finite, got {eps}"):
        xp.call(search, xp.asarray(HIST), xp.asarray(EDGES), num_quantized_bins=3, eps=eps)


@pytest.mark.parametrize("search", SEARCHES)
def test_lists_are_refused(search):
    with pytest.raises(ArrayTypeError, match=r"`hist` must be a NumPy or JAX array, got list"):
        search(HIST, EDGES, num_quantized_bins=3)
    with pytest.raises(ArrayTypeError, match=r"`edges` must be a NumPy or JAX array, got list"):
        search(np.array(HIST), EDGES.tolist(), num_quantized_bins=3)


@pytest.mark.parametrize("search", SEARCHES)
def test_torch_tensors_are_sent_to_the_backend(search):
    torch = import_torch()
    with pytest.raises(ArrayTypeError, match=r"`hist` .* got torch\.Tensor; .*klquant\.backends\.torch"):
        search(torch.tensor(HIST), torch.tensor(EDGES), num_quantized_bins=3)


@needs_jax
@pytest.mark.parametrize("search", SEARCHES)
def test_mixed_libraries_are_refused(search):
    with pytest.raises(ArrayTypeError, match=r"one library, got `hist` from jax, `edges` from numpy"):
        search(JAX.asarray(HIST), EDGES, num_quantized_bins=3)


def test_no_feasible_candidate_is_a_named_error(eager):
    with pytest.raises(InfeasibleError, match=r"`hist` must have a feasible candidate, got none: it is empty"):
        klquant.optimal_threshold(eager.asarray(np.zeros(7, int)), eager.asarray(EDGES), num_quantized_bins=3)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("num_bins", [15, 255, 2001])
def test_edges_that_linspace_rounds_are_symmetric_enough(dtype, num_bins):
    if dtype == "float16" and num_bins > 255:
        num_bins = 501  # more would not increase strictly
    hist = np.ones(num_bins, int)
    for amax in (3.3, 0.07):
        edges = np.linspace(-amax, amax, num_bins + 1).astype(dtype)
        curve = klquant.divergence_curve(hist, edges, num_quantized_bins=3)
        assert np.isfinite(curve).all()


@pytest.mark.parametrize(("times", "accepted"), [(7.6, True), (8.4, False)])
def test_how_far_from_symmetric_float32_may_be(times, accepted):
    edges = np.array([-256, -1, -0.5, 0.5, 1, 256], np.float32)
    edges[0] += np.float32(times * np.finfo(np.float32).eps * 256)  # more than a millionth of the narrowest bin
    with contextlib.nullcontext() if accepted else pytest.raises(InvalidInputError, match="symmetric about 0"):
        klquant.divergence_curve(np.ones(5, int), edges, num_quantized_bins=3)


@pytest.mark.parametrize(("times", "accepted"), [(0.9e-6, True), (1.1e-6, False)])
def test_how_far_from_symmetric_in_bins(times, accepted):
    edges = with_entry(EDGES * 100, 0, -350 + times * 100)
    with contextlib.nullcontext() if accepted else pytest.raises(InvalidInputError, match="symmetric about 0"):
        klquant.divergence_curve(np.array(HIST), edges, num_quantized_bins=3)


@pytest.mark.parametrize("end", [SMALLEST, LARGEST])
def test_the_ends_themselves_are_accepted(end):
    edges = EDGES / EDGES[-1] * end
    assert edges[-1] == end
    assert np.isfinite(float(klquant.max_threshold(np.array(HIST), edges, num_quantized_bins=3)))


def test_integer_edges_have_no_tolerance_for_rounding():
    edges = np.array([-(2**53), -2, -1, 1, 2, 2**53 - 2])
    with pytest.raises(InvalidInputError, match="symmetric about 0"):
        klquant.divergence_curve(np.ones(5, int), edges, num_quantized_bins=3)


def test_a_total_just_below_the_limit_is_accepted(eager):
    hist = eager.asarray([2**62, 0, 0, 1, 0, 0, 2**62 - 2])
    threshold = klquant.optimal_threshold(hist, eager.asarray(EDGES), num_quantized_bins=3)
    assert float(threshold.divergence) >= 0


@pytest.mark.parametrize("value", [3, 255, np.int64(5), np.int32(7)])
def test_odd_integers_of_python_and_numpy_pass(value):
    check_odd("n", value)


@pytest.mark.parametrize("value", [1e-300, 1, np.float32(2), 1e300])
def test_positive_numbers_pass(value):
    check_positive("x", value)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64", "uint64", "float16", "float32", "float64"])
def test_counts_of_every_real_dtype_pass(eager, dtype):
    check_vector("hist", eager.asarray([0, 1, 100], dtype))
