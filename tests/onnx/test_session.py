import weakref

import numpy as np
import pytest

import klquant
from klquant.backends.collection import collect_counts, collect_ranges, histograms_of
from klquant.backends.onnx import Settings, prepare
from klquant.backends.onnx.session import open_session
from klquant.errors import InvalidInputError, ModelError
from support.onnx_models import build, run_all

CPU = ("CPUExecutionProvider",)
SETTINGS = Settings.make(num_bins=301)
RNG = np.random.default_rng(2)
X = (RNG.integers(-40, 41, (12, 4)) / 8).astype(np.float32)  # whose sums are exact in any order


def deep():
    """Return a network that computes exactly, so that the order of summation does not matter."""
    weights = {name: (RNG.integers(-8, 9, (4, 4)) / 8).astype(np.float32) for name in "uvw"}
    return prepare(
        build("float[n, 4] x", "float y", "a = MatMul(x, u) b = Relu(a) c = MatMul(b, v) y = Gemm(c, w)", **weights)
    )


DEEP = deep()
ALL = ["x", "a", "b", "c", "y"]


def both(batches, *, model=DEEP, names=ALL, settings=SETTINGS):
    with open_session(model, names, CPU) as observed:
        ranges = collect_ranges(observed, batches)
        counts = collect_counts(observed, batches, ranges.amax, settings)
    assert ranges.num_batches == counts.num_batches == len(batches)
    return ranges.amax, {name: histogram for name, (histogram, _) in histograms_of(counts).items()}


def histograms_only(batches, amax, settings=SETTINGS):
    with open_session(DEEP, ALL, CPU) as observed:
        return collect_counts(observed, batches, amax, settings)


def assert_same(a, b):
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        assert a[1][name].hist.tobytes() == b[1][name].hist.tobytes()
        assert a[1][name].edges.tobytes() == b[1][name].edges.tobytes()


def test_tensors_are_counted_as_by_the_core():
    amax, histograms = both([X])
    tensors = {"x": X, **run_all(DEEP.model, x=X)}
    assert list(amax) == ALL
    for name in ALL:
        assert amax[name] == abs(tensors[name]).max()
        expected = klquant.histogram(tensors[name], num_bins=301, amax=amax[name])
        assert_same(({}, {name: histograms[name]}), ({}, {name: expected}))


@pytest.mark.parametrize("sizes", [[5, 5, 2], [1] * 12, [1, 11], [6, 0, 6]], ids=str)
def test_results_do_not_depend_on_split_or_order_of_the_data(sizes):
    whole, parts = both([X]), np.split(X, np.cumsum(sizes)[:-1])
    assert_same(both(parts), whole)
    assert_same(both([part[::-1] for part in parts[::-1]]), whole)


@pytest.mark.parametrize("names", [["x"], ["y"], ["c", "x"]])
def test_only_what_is_asked_for_is_observed(names):
    amax, histograms = both([X], names=names)
    assert list(amax) == list(histograms) == names
    assert_same((amax, histograms), tuple({name: part[name] for name in names} for part in both([X])))


def test_a_tensor_that_is_always_zero_has_no_histogram():
    amax, histograms = both([0 * X])
    assert set(amax.values()) == {0.0}
    assert histograms == {}


def test_amax_is_capped_and_no_count_is_lost():
    amax, histograms = both([X], settings=Settings.make(num_bins=301, max_amax=2.5))
    assert amax["x"] == 5
    assert histograms["x"].edges[-1] == 2.5
    assert histograms["x"].hist.sum() == X.size
    assert histograms["x"].hist[-1] == (X > 2.5 * (1 - 1 / 301)).sum()


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_observed_as_they_are(dtype):
    kind = {np.float16: "float16", np.float64: "double"}[dtype]
    weight = (RNG.integers(-8, 9, (4, 4)) / 8).astype(dtype)
    model = prepare(build(f"{kind}[n, 4] x", f"{kind} y", "a = MatMul(x, w) y = Relu(a)", w=weight))
    amax, histograms = both([X.astype(dtype)], model=model, names=["x", "a", "y"])
    products = X.astype(np.float64) @ weight.astype(np.float64)
    assert amax == {"x": abs(X).max(), "a": abs(products).max(), "y": products.max()}
    expected = klquant.histogram(products, num_bins=301, amax=amax["a"])
    assert_same(({}, {"a": histograms["a"]}), ({}, {"a": expected}))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 2])
def test_values_that_are_not_finite_are_refused_with_tensor_and_batch(bad, at):
    batches = [X.copy() for _ in range(3)]
    batches[at][1, 1] = bad
    with pytest.raises(InvalidInputError, match=f"tensor `x`, batch {at}: activations must be finite, got"):
        both(batches)


def test_infinity_is_found_in_the_tensor_where_it_arises():
    model = prepare(build("float[n, 4] x", "float y", "a = Mul(x, x) b = Exp(a) y = Relu(b)"))
    with pytest.raises(InvalidInputError, match="tensor `b`, batch 1: activations must be finite, got inf"):
        both([X / 4, 8 * X], model=model, names=["x", "a", "b", "y"])


def test_nan_in_pass_2_alone_is_refused_too():
    with pytest.raises(InvalidInputError, match="tensor `x`, batch 1: activations must be finite"):
        histograms_only([X, X * np.nan], both([X])[0])


def test_larger_values_in_pass_2_are_refused():
    amax = both([X])[0]
    with pytest.raises(InvalidInputError, match=r"tensor `x`, batch 1: expected the data of pass 1 with amax = 5"):
        histograms_only([X, 1.02 * X], amax)
    histograms_only([X, 1.0001 * X], amax)  # the rounding of another kernel


def test_other_values_in_pass_2_are_refused_after_zeros():
    with pytest.raises(InvalidInputError, match="expected the data of pass 1"):
        histograms_only([1e-3 * X], both([0 * X])[0])


def test_no_data_is_an_error():
    with pytest.raises(InvalidInputError, match="expected at least one calibration batch, got none"):
        both([])


def test_a_batch_that_does_not_fit_is_refused_with_its_number():
    with pytest.raises(InvalidInputError, match=r"batch 1: input `x` must have shape \(n, 4\), got \(12, 2\)"):
        both([X, X[:, :2]])


def test_errors_of_onnxruntime_name_the_batch(capfd):
    model = prepare(build("float[n, 4] x, float[n, 4] z", "float y", "y = Add(x, z)"))
    with pytest.raises(ModelError, match="batch 1: onnxruntime failed, with Fail: ") as caught:
        both([(X, X), (X, X[:5])], model=model, names=["y"])
    assert caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", "")


def test_a_model_that_onnxruntime_cannot_load_is_an_error():
    prepared = deep()
    prepared.model.graph.node[0].op_type = "Strange"
    with (
        pytest.raises(ModelError, match=r"onnxruntime cannot load the model: .*Strange"),
        open_session(prepared, ALL, CPU),
    ):
        pass


def test_errors_of_the_data_pass_through():
    def data():
        yield X
        raise LookupError("from the data")

    with pytest.raises(LookupError, match="from the data"), open_session(DEEP, ALL, CPU) as observed:
        collect_ranges(observed, data())


def test_providers_that_are_not_there_are_refused():
    with (
        pytest.raises(InvalidInputError, match=r"`providers` must be among .*CPUExecutionProvider.*, got 'NoProvider'"),
        open_session(DEEP, ALL, (*CPU, ("NoProvider", {}))),
    ):
        pass


def test_batches_are_seen_one_at_a_time():
    """A batch is free again when the next one is made."""
    alive = []

    class Batches:
        def __iter__(self):
            for _ in range(3):
                alive.append(sum(reference() is not None for reference in references))
                batch = X.copy()
                references.append(weakref.ref(batch))
                yield batch
                del batch

    references = []
    with open_session(DEEP, ALL, CPU) as observed:
        collect_ranges(observed, Batches())
    assert max(alive) <= 1
