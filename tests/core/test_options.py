"""Scalars, flags and axes: what is accepted, what is refused, and what JAX may trace."""

import fractions

import numpy as np
import pytest

import klquant
import klquant.presets
from klquant import ArrayTypeError, InvalidInputError
from support.cases import even_edges
from support.namespaces import JAX, enable_x64, needs_jax

HIST, EDGES = np.array([1, 0, 3, 8, 20, 31, 2, 30, 22, 7, 0, 4, 1]), even_edges(13)
CRITERIA = [klquant.optimal_threshold, klquant.max_threshold, klquant.percentile_threshold, klquant.mse_threshold]
CURVES = [klquant.divergence_curve, klquant.mse_curve]


def call(function, hist=HIST, **options):
    return function(hist, EDGES, **{"num_quantized_bins": 5, **options})


def functions_with(option):
    return {
        "eps": [
            lambda eps: call(klquant.optimal_threshold, eps=eps),
            lambda eps: call(klquant.divergence_curve, eps=eps),
            lambda eps: klquant.smooth(HIST, eps=eps),
        ],
        "min_ratio": [lambda ratio: call(klquant.optimal_threshold, min_ratio=ratio)],
        "percentile": [lambda percentile: call(klquant.percentile_threshold, percentile=percentile)],
        "amax": [lambda amax: klquant.histogram(EDGES, num_bins=3, amax=amax)],
    }[option]


NUMBERS = [(name, f) for name in ("eps", "min_ratio", "percentile", "amax") for f in functions_with(name)]


@pytest.mark.parametrize(("name", "function"), NUMBERS)
@pytest.mark.parametrize("bad", ["x", None, True, np.True_, np.array(True), np.array([1.0]), [0.5], 1j, np.array(1j)])
def test_what_is_no_real_number_is_refused_by_name(name, function, bad):
    if bad is None and name == "amax":
        return
    with pytest.raises((ArrayTypeError, InvalidInputError), match=f"`{name}` must "):
        function(bad)


@pytest.mark.parametrize(("name", "function"), NUMBERS)
@pytest.mark.parametrize("number", [np.float32(0.5), np.array(0.5), fractions.Fraction(1, 2), np.float16(0.5)])
def test_every_real_number_is_accepted(name, function, number):
    np.testing.assert_equal(function(number), function(0.5))


@pytest.mark.parametrize(("name", "function"), NUMBERS)
@pytest.mark.parametrize("number", [10**400, -(10**400), float("nan")], ids=["huge", "very negative", "NaN"])
def test_numbers_out_of_range_are_refused_by_name(name, function, number):
    with pytest.raises(InvalidInputError, match=f"`{name}` must "):
        function(number)


@pytest.mark.parametrize("bad", ["no", 1, None, np.array([1, 0])])
def test_flags_are_true_or_false(bad):
    for criterion in CRITERIA + CURVES:
        with pytest.raises(ArrayTypeError, match="`skip_zeros` must be True or False, got"):
            call(criterion, skip_zeros=bad)
    for search in (klquant.optimal_threshold, klquant.divergence_curve):
        with pytest.raises(ArrayTypeError, match="`one_sided` must be True or False, got"):
            call(search, one_sided=bad)
    assert call(klquant.optimal_threshold, one_sided=np.True_) == call(klquant.optimal_threshold, one_sided=True)


@pytest.mark.parametrize("axis", [True, 0.0, (0, 1), "0"])
def test_an_axis_is_an_int(axis):
    x = np.ones((2, 2))
    for function in (klquant.quantize, klquant.fake_quantize):
        with pytest.raises(ArrayTypeError, match="`axis` must be an int"):
            function(x, np.ones(2), axis=axis)
    with pytest.raises(ArrayTypeError, match="`axis` must be an int"):
        klquant.histogram(x, axis=axis)


@pytest.mark.parametrize("function", [*CRITERIA, *CURVES])
def test_bits_are_levels(function):
    for bits, levels in ((2, 3), (3, 7)):
        expected = function(HIST, EDGES, num_quantized_bins=levels)
        np.testing.assert_equal(function(HIST, EDGES, num_bits=bits), expected)
    with pytest.raises(InvalidInputError, match="must not both be given, got 3 and 2"):
        function(HIST, EDGES, num_quantized_bins=3, num_bits=2)
    with pytest.raises(InvalidInputError, match="`num_bits` must be from 2 to 32, got 1"):
        function(HIST, EDGES, num_bits=1)
    with pytest.raises(ArrayTypeError, match="`num_bits` must be an int, got bool"):
        function(HIST, EDGES, num_bits=True)


def test_bits_of_a_quantizer_are_levels():
    x = np.array([-9.0, 0.3, 1.0])
    assert klquant.scale(7.0, num_bits=4) == 1.0
    assert klquant.quantize(x, 0.5, num_bits=4).tolist() == [-7, 1, 2]
    assert klquant.fake_quantize(x, 0.5, num_bits=4).tolist() == [-3.5, 0.5, 1.0]


@pytest.mark.parametrize("function", [*CRITERIA, *CURVES])
def test_skipped_zeros_are_an_empty_centre_bin(eager, function):
    hist = np.stack([HIST, HIST[::-1]])
    hist[:, 6] = 1000
    cleared = hist.copy()
    cleared[:, 6] = 0
    found = function(eager.asarray(hist), eager.asarray(EDGES), num_quantized_bins=5, skip_zeros=True)
    expected = function(eager.asarray(cleared), eager.asarray(EDGES), num_quantized_bins=5)
    np.testing.assert_equal(as_arrays(found), as_arrays(expected))
    assert (hist[:, 6] == 1000).all()


def as_arrays(found):
    if not isinstance(found, klquant.Threshold):
        return np.asarray(found)
    return [np.asarray(getattr(found, name)) for name in ("value", "index", "divergence", "clipped", "sqnr_db")]


def test_skipped_zeros_are_not_clipped_by_a_one_sided_search():
    x = np.maximum(np.random.default_rng(0).normal(size=200_000), 0)
    found = klquant.optimal_threshold(*klquant.histogram(x), one_sided=True, skip_zeros=True)
    assert float(found.clipped) < 1e-3


@pytest.mark.parametrize("criterion", [klquant.max_threshold, klquant.percentile_threshold])
@pytest.mark.parametrize("num_bins", [3, 5])
def test_three_bins_have_a_maximum_and_percentiles(eager, criterion, num_bins):
    hist = eager.asarray(np.arange(1, num_bins + 1))
    found = criterion(hist, eager.asarray(even_edges(num_bins)))
    assert float(found) == pytest.approx(num_bins / 2, rel=1e-3)
    with pytest.raises(InvalidInputError, match="`hist` must have at least 3 bins, got 1"):
        criterion(eager.asarray([1]), eager.asarray([-1.0, 1.0]))


@needs_jax
@pytest.mark.parametrize(
    ("function", "values"),
    [
        (lambda h, e, eps: klquant.optimal_threshold(h, e, num_quantized_bins=5, eps=eps), [1e-6, 1e-4, 3e-3, 0.4]),
        (lambda h, e, eps: klquant.divergence_curve(h, e, num_quantized_bins=5, eps=eps), [1e-6, 1e-4, 3e-3, 0.4]),
        (lambda h, e, r: klquant.optimal_threshold(h, e, num_quantized_bins=5, min_ratio=r), [0.0, 0.5, 0.8, 1.0]),
        (lambda h, e, p: klquant.percentile_threshold(h, e, percentile=p), [1, 50.0, 99.9, 100.0]),
        (lambda h, e, a: klquant.histogram(h, num_bins=7, amax=a), [0.1, 7.0, 31.0, 1e6]),
    ],
)
def test_numbers_may_be_traced(function, values):
    import jax

    with enable_x64():
        traced = jax.jit(function)
        arrays = JAX.asarray(HIST), JAX.asarray(EDGES)
        for value in values:
            expected = jax.tree.map(np.asarray, function(*arrays, value))
            found = jax.tree.map(np.asarray, traced(*arrays, value))
            for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-13)
        for bad in (-1.0, np.nan, np.inf):
            found = jax.tree.leaves(traced(*arrays, bad))
            assert any(np.isnan(leaf).all() for leaf in found if leaf.dtype == np.float64)
        mapped = jax.vmap(lambda value: function(*arrays, value))(jax.numpy.asarray(values, dtype="float64"))
        assert all(leaf.shape[0] == len(values) for leaf in jax.tree.leaves(mapped))


@needs_jax
def test_a_sweep_does_not_compile_anew():
    import jax

    traces = []

    def count_traces(h, e, x):
        traces.append(1)
        return klquant.percentile_threshold(h, e, percentile=x)

    with enable_x64():
        compiled = jax.jit(count_traces)
        for percentile in (99.0, 99.1, 99.2):
            compiled(JAX.asarray(HIST), JAX.asarray(EDGES), percentile)
    assert len(traces) == 1


@needs_jax
def test_traced_numbers_need_jax_arrays():
    import jax

    with pytest.raises(ArrayTypeError, match="`hist` from numpy, `min_ratio` from jax"):
        jax.jit(lambda r: call(klquant.optimal_threshold, min_ratio=r))(0.5)
    with pytest.raises(ArrayTypeError, match="`x` from numpy, `amax` from jax"):
        jax.jit(lambda a: klquant.histogram(EDGES, amax=a))(0.5)


@pytest.mark.parametrize("make", [np.ma.masked_array, np.ma.MaskedArray])
def test_masked_arrays_are_refused_by_name(make):
    for function in (klquant.max_threshold, klquant.optimal_threshold):
        with pytest.raises(ArrayTypeError, match=r"`hist` must be a plain .* got numpy.MaskedArray; .*filled"):
            call(function, make(HIST))
    for function in (klquant.histogram, klquant.smooth, klquant.scale, lambda x: klquant.quantize(x, 1.0)):
        with pytest.raises(ArrayTypeError, match="must be a plain NumPy array"):
            function(make([1.0, 2.0], mask=[0, 1]))
    with pytest.raises(ArrayTypeError, match="must be a plain NumPy array"):
        klquant.presets.mxnet_threshold(make(HIST), EDGES, num_quantized_bins=5)
    with pytest.raises(ArrayTypeError, match="`amax` must be a plain NumPy array"):
        klquant.histogram(EDGES, amax=make(2.0))
    with pytest.raises(ArrayTypeError, match="`eps` must be a plain NumPy array"):
        call(klquant.optimal_threshold, eps=make(1e-4))


def test_matrices_are_refused_by_name():
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix([[1.0, 2.0]])
    with pytest.raises(ArrayTypeError, match=r"`x` must be a plain NumPy array, got numpy.matrix; .*np.asarray"):
        klquant.histogram(matrix)


@pytest.mark.parametrize("name", ["float8_e5m2", "float8_e4m3fn"])
def test_all_floats_of_8_bits_are_refused(name):
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name))
    small = np.ones(3, dtype)
    for function in (klquant.histogram, klquant.smooth, lambda x: klquant.quantize(x, 1.0)):
        with pytest.raises(ArrayTypeError, match=f"got dtype {name}"):
            function(small)
    with pytest.raises(ArrayTypeError, match=f"got {name}"):
        klquant.dequantize(np.ones(3, np.int8), 1.0, dtype=dtype)


def test_totals_too_small_for_float64_are_refused():
    with pytest.raises(InvalidInputError, match=r"`hist` must have a total of 0 or at least 1e-30, got 1\.3"):
        call(klquant.optimal_threshold, np.full(13, 1e-40))
