from functools import partial
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import event, given, note
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.nn import functional as F

import klquant
from klquant.backends.torch import collect_amax, collect_histograms, fake_quantize, fold_batch_norm, fold_relu
from klquant.backends.torch.folding.api import examine
from klquant.backends.torch.folding.apply import apply_folds
from klquant.backends.torch.folding.verify import verified_forward
from klquant.backends.torch.model.forward import call_model
from support.networks import Net, batch, eighths, exact, is_same, outputs, ready

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ACTIVATIONS = [nn.Identity, nn.ReLU, nn.ReLU6, nn.Tanh, lambda: nn.ReLU(inplace=True)]
SIZES = st.sampled_from([2, 4, 6])


@st.composite
def layers(draw, rank, channels):
    """Draw a layer that keeps the rank, and the number of its output channels."""
    out, bias = draw(SIZES), draw(st.booleans())
    if rank == 0:
        return nn.Linear(channels, out, bias=bias), out
    kernel = draw(st.integers(1, 3))
    if draw(st.booleans()):
        return TRANSPOSED[rank](channels, out, kernel, stride=draw(st.integers(1, 2)), bias=bias), out
    groups = draw(st.sampled_from([k for k in (1, 2, channels) if channels % k == 0 and out % k == 0]))
    mode = draw(st.sampled_from(["zeros", "circular"]))
    padding = draw(st.integers(kernel // 2, 1)) if kernel < 3 else 1  # never smaller than the kernel
    options = {"padding": padding, "padding_mode": mode, "groups": groups, "bias": bias}
    return CONVOLUTIONS[rank](channels, out, kernel, **options), out


@st.composite
def norms(draw, rank, channels):
    eps = draw(st.sampled_from([1e-5, 1e-3, 0.5]))
    return NORMS[rank](channels, eps=eps, affine=draw(st.booleans()))


@st.composite
def chains(draw):
    """Draw a chain of layers, most of them followed by a BatchNorm or an activation, and a batch for it."""
    rank, channels = draw(st.integers(0, 3), label="rank"), draw(SIZES, label="channels")
    shape = (5, channels, *[4] * rank)
    parts = []
    for _ in range(draw(st.integers(1, 3), label="blocks")):
        layer, channels = draw(layers(rank, channels))
        parts.append(layer)
        if draw(st.booleans()):
            parts.append(draw(norms(rank, channels)))
        parts.append(draw(st.sampled_from(ACTIVATIONS))())
    seed = draw(st.integers(0, 2**16), label="seed")
    return ready(nn.Sequential(*parts), seed=seed), batch(*shape, seed=seed)


@given(chains())
def test_folding_keeps_the_output_of_any_chain(chain):
    model, x = chain
    note(str(model))
    expected = outputs(model, x.clone())
    folded, folds = fold_batch_norm(model, x.clone())
    joined, relus = fold_relu(folded, x.clone())
    assert len(folds) == sum(isinstance(m, tuple(NORMS.values())) for m in model)
    assert all(fold.reason == "" for fold in folds)  # in a chain every norm follows its layer
    largest = expected.abs().max()
    assert (outputs(folded, x.clone()) - expected).abs().max() <= 1e-10 * largest
    assert torch.equal(outputs(joined, x.clone()), outputs(folded, x.clone()))
    assert len(relus) == sum(isinstance(m, (nn.ReLU, nn.ReLU6)) for m in model)


class Graph(NamedTuple):
    """The steps of a model: each calls an operation on some of the values so far. Value 0 is the input."""

    steps: list  # of (operation, indices of its arguments)
    returned: list  # indices of values
    order: list  # the order in which the modules are registered
    linear: bool


MODULES = ["layer0", "layer1", "layer2", "norm0", "norm1", "norm2", "relu", "relu6", "pass"]
FUNCTIONS = {
    "F.relu": F.relu,
    "relu_": torch.relu_,
    "F.relu6": F.relu6,
    "tanh": torch.tanh,
    "add": lambda a, b: (a + b) / 2,
}
KINDS = {"relu": "relu", "relu6": "relu6", "F.relu": "relu", "relu_": "relu", "F.relu6": "relu6"}
RELUS = ["", "relu", "relu6", "F.relu", "relu_", "F.relu6"]


@st.composite
def graphs(draw):
    """Draw a model of blocks with branches, modules that are called again, and values changed in place."""
    operations = []
    for k in range(draw(st.integers(1, 3), label="blocks")):
        norm = draw(st.sampled_from(["", f"norm{k}", f"norm{k}"]))
        operations += filter(None, [f"layer{k}", norm, draw(st.sampled_from(RELUS))])
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]), label="disturbances")):
        where = draw(st.integers(0, len(operations)))
        operations.insert(where, draw(st.sampled_from([*MODULES, *FUNCTIONS])))
    steps = []
    for last, operation in enumerate(operations):
        first = last if draw(st.integers(0, 7)) else draw(st.integers(0, last))  # most take the last value
        steps.append((operation, [first] if operation != "add" else [first, draw(st.integers(0, last))]))
    returned = [len(steps), *([] if draw(st.integers(0, 4)) else [draw(st.integers(0, len(steps)))])]
    return Graph(steps, returned, draw(st.permutations(MODULES), label="order"), draw(st.booleans(), label="linear"))


def run_graph(graph, net, x):
    values = [x]
    for operation, arguments in graph.steps:
        function = FUNCTIONS.get(operation) or net.get_submodule(operation)
        values.append(function(*(values[k] for k in arguments)))
    return [values[k] for k in graph.returned]


def network(graph, seed, dtype=torch.float64):
    """Return the model of a graph, and a batch."""
    make = {"layer": lambda: nn.Linear(3, 3) if graph.linear else nn.Conv1d(3, 3, 3, padding=1),
            "norm": lambda: nn.BatchNorm1d(3), "relu": nn.ReLU, "relu6": nn.ReLU6, "pass": nn.Identity}  # fmt: skip
    modules = {name: make.get(name, make.get(name[:-1]))() for name in graph.order}
    model = ready(Net(partial(run_graph, graph), **modules), seed=seed, dtype=dtype)
    return model, 3 * batch(7, 3, *[4] * (not graph.linear), seed=seed, dtype=dtype)


def expected_folds(graph):
    """Return the possible folds as (layer, kind), from the steps alone.

    The step that made a tensor identifies it. `made[k]` is this step for value k; an in-place change replaces it.
    """
    tensor, made, uses = [0], {0: None}, [[] for _ in graph.steps]
    for step, (operation, arguments) in enumerate(graph.steps):
        for k in arguments:
            if made[tensor[k]] is not None and operation != "pass":
                uses[made[tensor[k]]].append(step)
        same = operation in ("pass", "relu_")
        tensor.append(tensor[arguments[0]] if same else step + 1)
        made[tensor[-1]] = made[tensor[-1]] if operation == "pass" else step
    for k in graph.returned:
        if made[tensor[k]] is not None:
            uses[made[tensor[k]]].append(None)
    names = [operation for operation, _ in graph.steps]
    only = [names[users[0]] if len(users) == 1 and users[0] is not None else "" for users in uses]
    found, ends = set(), {}
    for name in ("layer0", "layer1", "layer2"):
        calls = ends[name] = [step for step, operation in enumerate(names) if operation == name]
        if len(calls) == 1 and only[calls[0]].startswith("norm") and names.count(only[calls[0]]) == 1:
            found.add((name, "batch_norm"))
            ends[name] = [uses[calls[0]][0]]
    relus = {name: {only[step] for step in steps} for name, steps in ends.items()}
    return found | {
        (name, KINDS[min(users)]) for name, users in relus.items() if len(users) == 1 and min(users) in KINDS
    }


@given(graph=graphs(), seed=st.integers(0, 2**16))
def test_folding_keeps_the_output_of_any_graph(graph, seed):
    model, x = network(graph, seed)
    note(str(graph))
    folds = examine(model, [x]).folds
    done = {(fold.into, fold.kind) for fold in folds if not fold.reason}
    assert done == expected_folds(graph)
    event(f"{len(done)} folds")
    folded = apply_folds(model, folds)
    for given_x in (x, -x):
        for got, expected in zip(outputs(folded, given_x.clone()), outputs(model, given_x.clone()), strict=True):
            assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()
    once, norms = fold_batch_norm(model, [x])
    twice, relus = fold_relu(once, [x])
    assert norms + relus == folds
    assert all(map(torch.equal, outputs(twice, x.clone()), outputs(folded, x.clone())))


@given(graph=graphs(), seed=st.integers(0, 2**16), observe=st.sampled_from(["inputs", "outputs"]))
def test_observing_changes_no_bit_of_the_output(graph, seed, observe):
    model, x = network(graph, seed, torch.float32)
    note(str(graph))
    folds = examine(model, [x]).folds
    folded, seen = apply_folds(model, folds), []

    def forward(net, item):
        seen.append(call_model(net, item))

    expected = outputs(folded, x.clone())
    for run in (forward, verified_forward(forward, folds)):
        amax = collect_amax(folded, [[x]], observe=observe, forward=run)
        collect_histograms(folded, [[x]], amax, observe=observe, forward=run, num_bins=255)
    assert len(seen) == 4
    assert all(is_same(got, wanted) for out in seen for got, wanted in zip(out, expected, strict=True))


@given(
    order=st.permutations(range(10)),
    cuts=st.sets(st.integers(1, 9)),
    observe=st.sampled_from(["inputs", "outputs"]),
    scale=st.integers(-20, 20),
)
def test_the_split_and_the_order_of_the_data_do_not_matter(order, cuts, observe, scale):
    model = exact(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    x = eighths(10, 3) * 2.0**scale
    for layer in (model[0], model[2]):
        layer.bias.data.zero_()  # or sums with tiny data would be rounded
    parts = [x[rows] for rows in np.split(np.array(order), sorted(cuts))]
    amax = collect_amax(model, [x], observe=observe)
    assert collect_amax(model, parts, observe=observe) == amax
    whole = collect_histograms(model, [x], amax, observe=observe, num_bins=255)
    split = collect_histograms(model, parts, amax, observe=observe, num_bins=255)
    assert {name: h.hist.tolist() for name, h in split.items()} == {name: h.hist.tolist() for name, h in whole.items()}


def tensors(dtype, width):
    limit = 2.0 ** (width - 1)
    halves = st.integers(-300, 300).map(lambda k: k / 2)  # ties for scale 1
    elements = st.one_of(st.floats(-limit, limit, width=32), halves)
    return hnp.arrays(dtype, hnp.array_shapes(max_dims=3, max_side=6), elements=elements)


SCALES = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(2.0**-20, 2.0**20, width=32))


@given(x=st.one_of(tensors(np.float32, 20), tensors(np.float64, 20)), scale=SCALES)
def test_fake_quantize_is_that_of_the_core(x, scale):
    got = fake_quantize(torch.from_numpy(x), torch.tensor(scale, dtype=torch.float32))
    np.testing.assert_array_equal(got.numpy(), klquant.fake_quantize(x, scale), strict=True)


@given(x=tensors(np.float32, 20), data=st.data())
def test_fake_quantize_along_an_axis_is_that_of_the_core(x, data):
    axis = data.draw(st.integers(0, x.ndim - 1), label="axis")
    scale = data.draw(hnp.arrays(np.float32, x.shape[axis], elements=SCALES.filter(np.isfinite)), label="scale")
    got = fake_quantize(torch.from_numpy(x), torch.from_numpy(scale), axis=axis)
    np.testing.assert_array_equal(got.numpy(), klquant.fake_quantize(x, scale, axis=axis), strict=True)


@given(x=tensors(np.float32, 20), scale=SCALES)
def test_fake_quantize_is_idempotent_monotone_and_odd(x, scale):
    x, scale = torch.from_numpy(x).reshape(-1).sort().values, torch.tensor(scale, dtype=torch.float32)
    once = fake_quantize(x, scale)
    assert torch.equal(fake_quantize(once, scale), once)
    assert (once.diff() >= 0).all()
    assert torch.equal(fake_quantize(-x, scale), -once)


@given(x=tensors(np.float64, 20), scale=st.floats(2.0**-20, 2.0**20, width=32))
def test_fake_quantize_is_half_a_step_away_inside_the_range_and_at_its_end_outside(x, scale):
    x = torch.from_numpy(x)
    got = fake_quantize(x, torch.tensor(scale, dtype=torch.float32))
    inside = x.abs() <= 127 * scale
    assert ((got - x).abs()[inside] <= scale / 2 * (1 + 1e-12)).all()
    assert (got.abs()[~inside] == 127 * scale).all()
