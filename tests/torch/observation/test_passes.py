import numpy as np
import pytest
import torch
from torch import nn

import klquant
from klquant.backends.torch import collect_amax, collect_histograms, fold_relu
from klquant.errors import InvalidInputError, ModelError
from support.networks import Broken, Net, batch, eighths, exact, fingerprint, is_same, mlp, outputs

X = eighths(12, 4)
NUM_BINS = 301


def deep():
    """Return a network that computes exactly, so that no order of summation shows in it."""
    return exact(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 5)), nn.Linear(5, 2)))


def both(model, batches, **options):
    amax = collect_amax(model, batches, **options)
    return amax, collect_histograms(model, batches, amax, num_bins=NUM_BINS, **options)


def assert_same_histograms(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].hist.tobytes() == b[name].hist.tobytes()
        assert a[name].edges.tobytes() == b[name].edges.tobytes()


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
def test_the_observed_tensors_are_counted_as_by_the_core(observe):
    model = deep()
    stages = {name: (at, at + 1) for name, at in (("0", 0), ("2.0", 2), ("3", 3))}
    amax, histograms = both(model, [X], observe=observe)
    assert list(amax) == list(histograms) == list(stages)
    for name, (before, after) in stages.items():
        tensor = outputs(model[: before if observe == "inputs" else after], X).numpy()
        assert amax[name] == abs(tensor).max()
        expected = klquant.histogram(tensor, num_bins=NUM_BINS, amax=amax[name])
        assert_same_histograms({name: histograms[name]}, {name: expected})
        assert isinstance(histograms[name].hist, np.ndarray)


def test_a_joined_layer_is_observed_after_its_relu_under_its_own_name():
    model, _ = fold_relu(deep(), X)
    amax, histograms = both(model, [X], observe="outputs")
    assert list(amax) == ["0", "2.0", "3"]
    assert not histograms["0"].hist[: NUM_BINS // 2].any()
    assert histograms["2.0"].hist[: NUM_BINS // 2].any()


def test_several_calls_of_a_layer_are_joined():
    model = exact(Net(lambda net, x: net.fc(x) + net.fc(-3 * x), fc=nn.Linear(4, 4)))
    amax, histograms = both(model, [X])
    assert amax == {"fc": 3 * X.abs().max().item()}
    assert histograms["fc"].hist.sum() == 2 * X.numel()
    expected = klquant.histogram(torch.cat([X, -3 * X]).numpy(), num_bins=NUM_BINS, amax=amax["fc"])
    assert_same_histograms(histograms, {"fc": expected})


def test_a_layer_that_is_not_called_is_missing():
    model = Net(lambda net, x: net.fc(x), fc=nn.Linear(4, 4), idle=nn.Linear(4, 4)).eval()
    amax, histograms = both(model, [X])
    assert list(amax) == list(histograms) == ["fc"]


def test_a_layer_with_names_in_two_places_is_observed_once_with_all_its_calls():
    fc = nn.Linear(4, 4)
    model = exact(nn.Sequential(nn.Sequential(fc), nn.Sequential(fc)))
    amax, histograms = both(model, [X])
    assert list(amax) == ["0.0"]
    assert amax["0.0"] == max(X.abs().max(), outputs(fc, X).abs().max())
    assert histograms["0.0"].hist.sum() == 2 * X.numel()


SPLITS = {
    "ragged": [5, 5, 2],
    "ones": [1] * 12,
    "one and the rest": [1, 11],
    "with an empty batch": [6, 0, 6],
}


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_split_and_the_order_of_the_data_do_not_show(observe, split):
    model = deep()
    whole = both(model, [X], observe=observe)
    parts = list(X.split(SPLITS[split]))
    for batches in (parts, parts[::-1], tuple(part.flip(0) for part in parts)):
        amax, histograms = both(model, batches, observe=observe)
        assert amax == whole[0]
        assert_same_histograms(histograms, whole[1])


def test_data_may_be_a_loader_that_shuffles():
    loader = torch.utils.data.DataLoader(X, batch_size=5, shuffle=True)
    amax, histograms = both(deep(), loader)
    assert amax == both(deep(), [X])[0]
    assert_same_histograms(histograms, both(deep(), [X])[1])


@pytest.mark.parametrize("wrap", [lambda a, b: (a, b), lambda a, b: [a, b], lambda a, b: {"b": b, "a": a}])
def test_batches_may_hold_several_arguments(wrap):
    model = exact(Net(lambda net, a, b: net.first(a) - net.second(b), first=nn.Linear(4, 4), second=nn.Linear(4, 4)))
    amax, _ = both(model, [wrap(X, 2 * X), wrap(X / 2, X)])
    assert amax == {"first": X.abs().max(), "second": 2 * X.abs().max()}


def test_forward_says_how_to_run_the_model():
    amax, histograms = both(deep(), [(X, "label")], forward=lambda model, item: model(4 * item[0]))
    assert amax["0"] == 4 * X.abs().max()
    assert histograms["0"].edges[-1] == amax["0"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_observed_as_they_are(dtype):
    amax, histograms = both(deep().to(dtype), [X.to(dtype)])
    assert amax["0"] == X.abs().max()
    assert histograms["0"].hist.sum() == X.numel()
    assert_same_histograms({"0": histograms["0"]}, {"0": both(deep(), [X])[1]["0"]})


def test_amax_is_capped_and_no_count_is_lost():
    data = X.clone()
    data[3, 1] = 4e6
    amax, histograms = both(nn.Sequential(nn.Linear(4, 4)).eval(), [data], max_amax=5.5)
    assert amax == {"0": 5.5}
    assert histograms["0"].edges[-1] == 5.5
    assert histograms["0"].hist.sum() == data.numel()
    assert histograms["0"].hist[-1] == (data > 5.5 * (1 - 1 / NUM_BINS)).sum()


def test_there_is_no_cap_by_default():
    assert collect_amax(nn.Sequential(nn.Linear(1, 1)).eval(), [torch.full((1, 1), 1e6)]) == {"0": 1e6}


def test_a_tensor_that_is_always_zero_has_no_histogram():
    amax, histograms = both(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4)).eval(), [0 * X])
    assert amax == {"0": 0.0, "1": 0.0}
    assert histograms == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 2])
def test_values_that_are_not_finite_are_refused_with_layer_and_batch(bad, at):
    batches = [X.clone() for _ in range(3)]
    batches[at][1, 1] = bad
    with pytest.raises(InvalidInputError, match=f"layer `first`, batch {at}: activations must be finite, got"):
        collect_amax(mlp(), batches)


def test_nan_is_laid_at_the_door_of_the_layer_that_it_enters():
    model = Net(lambda net, x: net.b(net.a(x).log()), a=nn.Linear(4, 4), b=nn.Linear(4, 4)).eval()
    with pytest.raises(InvalidInputError, match="layer `b`, batch 0: activations must be finite, got nan"):
        collect_amax(model, [X])


def test_nan_in_pass_2_alone_is_refused_too():
    with pytest.raises(InvalidInputError, match="layer `first`, batch 1"):
        collect_histograms(mlp(), [X, X * float("nan")], collect_amax(mlp(), [X]))


def test_larger_values_in_pass_2_are_refused():
    amax = collect_amax(mlp(), [X])
    with pytest.raises(InvalidInputError, match=r"layer `first`, batch 1: expected the data of pass 1 with amax = 5"):
        collect_histograms(mlp(), [X, 1.02 * X], amax)
    collect_histograms(mlp(), [X, 1.0001 * X], amax)  # the rounding of another kernel


def test_a_layer_first_called_in_pass_2_is_refused():
    model = Net(lambda net, x: net.b(x) if x.sum() > 0 else net.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)).eval()
    amax = collect_amax(model, [-X.abs()])
    assert list(amax) == ["a"]
    with pytest.raises(InvalidInputError, match="layer `b`, batch 0: expected the data of pass 1"):
        collect_histograms(model, [X.abs()], amax)


def test_anything_but_zeros_in_pass_2_is_refused_after_zeros():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    with pytest.raises(InvalidInputError, match="expected the data of pass 1"):
        collect_histograms(model, [1e-3 * X], collect_amax(model, [0 * X]))


@pytest.mark.parametrize("num_bins", [300, 1, -3])
def test_an_even_number_of_bins_is_refused(num_bins):
    with pytest.raises(InvalidInputError, match="`num_bins` must be odd"):
        collect_histograms(mlp(), [X], collect_amax(mlp(), [X]), num_bins=num_bins)


@pytest.mark.parametrize("collect", [collect_amax, lambda m, b, **o: collect_histograms(m, b, {}, **o)])
def test_no_data_are_an_error(collect):
    with pytest.raises(InvalidInputError, match="at least one calibration batch"):
        collect(mlp(), [])


def failing_data():
    yield X
    raise Broken


def failing_forward(model, x):
    model(x)
    raise Broken


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
@pytest.mark.parametrize(
    ("data", "options", "error"),
    [
        (lambda: [X, X], {}, None),
        (failing_data, {}, Broken),
        (lambda: [X], {"forward": failing_forward}, ModelError),
        (lambda: [X, X * float("nan")], {}, InvalidInputError),
        (lambda: [X[:, :2]], {}, ModelError),
    ],
    ids=["well", "data fail", "forward fails", "NaN", "model fails"],
)
def test_the_users_own_model_is_as_before_whatever_happens(observe, data, options, error):
    model = mlp()
    expected = outputs(model, X)
    amax = collect_amax(model, [X], observe=observe)
    before = fingerprint(model)
    for run in (
        lambda: collect_amax(model, data(), observe=observe, **options),
        lambda: collect_histograms(model, data(), amax, observe=observe, **options),
    ):
        if error is None:
            run()
        else:
            with pytest.raises(error):
                run()
        assert fingerprint(model) == before
    assert is_same(outputs(model, X), expected)


def test_the_given_amax_is_not_changed():
    amax = collect_amax(mlp(), [X])
    before = dict(amax)
    collect_histograms(mlp(), [0.5 * X], amax)
    assert amax == before


def test_weights_of_a_network_with_large_values_keep_small_and_large_counts_apart():
    """One outlier in a million: it sets the range, and the histogram still holds every count."""
    data = batch(1000, 4, dtype=torch.float32)
    data[17, 2] = 100.0
    amax, histograms = both(nn.Sequential(nn.Linear(4, 1)).eval(), [data])
    assert amax["0"] == 100
    assert histograms["0"].hist[-1] == 1
    assert histograms["0"].hist.sum() == 4000


# --- found wrong while these tests were written ---


@pytest.mark.parametrize("collect", [collect_amax, lambda m, b, **o: collect_histograms(m, b, {}, **o)])
def test_a_misspelt_observe_is_refused(collect):
    with pytest.raises(InvalidInputError, match="`observe` must be"):
        collect(mlp(), [X], observe="input")


@pytest.mark.parametrize("cap", [0, -1.0, float("nan")])
def test_a_cap_that_is_not_positive_is_refused(cap):
    with pytest.raises(InvalidInputError, match="max_amax"):
        collect_amax(mlp(), [X], max_amax=cap)
