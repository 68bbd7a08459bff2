import copy
import json
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from klquant.backends.torch import fold_batch_norm, fold_relu
from klquant.backends.torch.folding.api import Examination, Fold, _sound, examine
from klquant.backends.torch.folding.apply import apply_folds
from klquant.backends.torch.model.layers import LayerReLU
from klquant.backends.torch.model.products import Product
from klquant.errors import InvalidInputError, ModelError
from support.networks import Broken, Net, batch, fingerprint, is_same, outputs, ready

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONV_OPTIONS = {
    "plain": {},
    "no bias": {"bias": False},
    "strided": {"stride": 2, "padding": 1, "dilation": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4, "bias": False},
}
TRANSPOSED_OPTIONS = {"plain": {}, "no bias": {"bias": False}, "strided": {"stride": 2, "output_padding": 1}}
NORM_OPTIONS = {"": {}, "not affine": {"affine": False}, "large eps": {"eps": 0.5}}


def foldable():
    for rank in (1, 2, 3):
        shape = (2, 4, *(7, 6, 5)[:rank])
        for kinds, options in ((CONVOLUTIONS, CONV_OPTIONS), (TRANSPOSED, TRANSPOSED_OPTIONS)):
            for name, option in options.items():
                layer = kinds[rank - 1](4, 8, 3, **option)
                yield f"{type(layer).__name__} {name}", layer, NORMS[rank - 1](8), shape
    for name, option in NORM_OPTIONS.items():
        yield f"Conv2d {name}", nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, **option), (2, 4, 7, 6)
        yield f"ConvTranspose2d {name}", nn.ConvTranspose2d(4, 8, 3), nn.BatchNorm2d(8, **option), (2, 4, 7, 6)
        for bias in (True, False):
            case = f"Linear {bias=} {name}", nn.Linear(4, 8, bias=bias), nn.BatchNorm1d(8, **option), (9, 4)
            yield case
    yield "SyncBatchNorm", nn.Conv2d(4, 8, 3), nn.SyncBatchNorm(8), (2, 4, 7, 6)


def pair(use, conv=None, norm=None, **modules):
    """Return a network of a convolution that keeps the shape, a BatchNorm and others, used by ``use(net, x)``."""
    parts = {"conv": conv or nn.Conv1d(3, 3, 3, padding=1), "norm": norm or nn.BatchNorm1d(3), **modules}
    return ready(Net(use, **parts))


def norm_of_conv(net, x):
    return net.norm(net.conv(x))


def after_conv(use):
    """Return the forward of a network that goes on with ``use(net, y)`` after y = conv(x)."""
    return lambda net, x: use(net, net.conv(x))


def sharing(*names):
    model = pair(lambda net, x: net.other(norm_of_conv(net, x)), other=nn.Conv1d(3, 3, 3, padding=1))
    for name in names:
        setattr(model.other, name, getattr(model.conv, name))
    return model


def tied():
    model = pair(norm_of_conv)
    model.kernel = model.conv.weight
    return model


def hooked(name, register):
    model = pair(norm_of_conv)
    getattr(getattr(model, name), register)(lambda *args: None)
    return model


REFUSED = {
    "grouped transposed": (
        lambda: pair(norm_of_conv, conv=nn.ConvTranspose1d(4, 4, 3, groups=2), norm=nn.BatchNorm1d(4)),
        "grouped transposed",
        (2, 4, 5),
    ),
    "no statistics": (
        lambda: pair(norm_of_conv, norm=nn.BatchNorm1d(3, track_running_stats=False)),
        "running statistics",
    ),
    "norm after two layers": (
        lambda: pair(lambda net, x: norm_of_conv(net, x) + net.norm(net.other(x)), other=nn.Conv1d(3, 3, 3, padding=1)),
        "called more than once",
    ),
    "norm again on its own output": (
        lambda: pair(lambda net, x: net.norm(norm_of_conv(net, x))),
        "called more than once",
    ),
    "norm used first elsewhere": (
        lambda: pair(lambda net, x: norm_of_conv(net, net.norm(x))),
        "called more than once",
    ),
    "layer called twice": (
        lambda: pair(lambda net, x: norm_of_conv(net, net.conv(x))),
        "called more than once",
    ),
    "layer called again after the norm": (
        lambda: pair(lambda net, x: net.conv(norm_of_conv(net, x))),
        "called more than once",
    ),
    "both in a loop": (
        lambda: pair(lambda net, x: norm_of_conv(net, norm_of_conv(net, x))),
        "called more than once",
    ),
    "residual": (lambda: pair(after_conv(lambda net, y: y + net.norm(y))), "used elsewhere"),
    "layer output returned": (
        lambda: pair(after_conv(lambda net, y: [net.norm(y), y][1])),
        "used elsewhere",
    ),
    "changed in place": (lambda: pair(lambda net, x: net.norm(net.conv(x).mul_(2))), "used elsewhere"),
    "shared weight": (lambda: sharing("weight"), "shared"),
    "shared bias": (lambda: sharing("bias"), "shared"),
    "tied to a parameter of the model": (tied, "shared"),
    "weight read elsewhere": (
        lambda: pair(lambda net, x: norm_of_conv(net, x) + F.conv1d(x, net.conv.weight, padding=1)),
        "used elsewhere too",
    ),
    "bias read elsewhere": (lambda: pair(lambda net, x: norm_of_conv(net, x) + net.conv.bias.sum()), "used elsewhere"),
    "weight of the norm read elsewhere": (
        lambda: pair(lambda net, x: norm_of_conv(net, x) * net.norm.weight.sum()),
        "used elsewhere too",
    ),
    "attribute of the norm read": (lambda: pair(lambda net, x: norm_of_conv(net, x) / net.norm.eps), "makes it fail"),
    "hook on the layer": (lambda: hooked("conv", "register_forward_hook"), "hooks"),
    "pre-hook on the layer": (lambda: hooked("conv", "register_forward_pre_hook"), "hooks"),
    "hook on the norm": (lambda: hooked("norm", "register_forward_hook"), "hooks"),
    "pre-hook on the norm": (lambda: hooked("norm", "register_forward_pre_hook"), "hooks"),
    "linear in three dimensions": (
        lambda: pair(norm_of_conv, conv=nn.Linear(5, 3), norm=nn.BatchNorm1d(3)),
        "after a linear layer",
    ),
    "norm before the layer": (lambda: pair(lambda net, x: net.conv(net.norm(x))), "no convolution or linear"),
    "something between": (lambda: pair(lambda net, x: net.norm(net.conv(x) * 2)), "no convolution or linear"),
    "ReLU between": (
        lambda: pair(lambda net, x: net.norm(net.relu(net.conv(x))), relu=nn.ReLU()),
        "no convolution or linear",
    ),
    "inplace ReLU between": (
        lambda: pair(lambda net, x: net.norm(net.relu(net.conv(x))), relu=nn.ReLU(inplace=True)),
        "no convolution or linear",
    ),
    "never called": (lambda: pair(lambda net, x: net.conv(x)), "never called"),
}


@pytest.mark.parametrize(
    ("layer", "norm", "shape"), [pytest.param(*case[1:4], id=case[0], marks=case[4:]) for case in foldable()]
)
def test_folding_keeps_the_output(layer, norm, shape):
    model = ready(nn.Sequential(layer, norm))
    x = batch(*shape)
    expected = outputs(model, x)
    assert (expected - outputs(layer, x)).abs().max() > 0.1  # or there would be nothing to fold
    folded, folds = fold_batch_norm(model, x)
    assert folds == [Fold("1", "batch_norm", "0", "")]
    assert type(folded[0]) is type(layer)
    assert type(folded[1]) is nn.Identity
    assert folded[0].bias.shape == (8,)
    for other in (x, batch(*shape, seed=1)):
        expected = outputs(model, other)
        assert (outputs(folded, other) - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize(
    ("build", "reason", "shape"), [pytest.param(*(*case, (2, 3, 5))[:3], id=name) for name, case in REFUSED.items()]
)
def test_what_cannot_be_folded_is_left_alone_with_the_reason(build, reason, shape):
    model = build()
    x = batch(*shape)
    expected = outputs(model, x)
    folded, folds = fold_batch_norm(model, x)
    (fold,) = folds
    assert (fold.module, fold.kind) == ("norm", "batch_norm")
    assert reason in fold.reason
    assert type(folded.norm) is nn.BatchNorm1d
    assert is_same(outputs(folded, x), expected)


def test_refusals_that_look_foldable_would_change_the_output():
    """Linear + BatchNorm1d of equal widths on three dimensions: the shapes fit, the axes do not."""
    model = pair(norm_of_conv, conv=nn.Linear(5, 5), norm=nn.BatchNorm1d(5))
    x = batch(2, 5, 5)
    folded, (fold,) = fold_batch_norm(model, x)
    assert "after a linear layer" in fold.reason
    assert is_same(outputs(folded, x), outputs(model, x))
    folded, (fold,) = fold_batch_norm(model, x[0])  # the same network on (batch, features)
    assert fold.reason == ""
    torch.testing.assert_close(outputs(folded, x[0]), outputs(model, x[0]))


def test_a_norm_is_paired_by_calls_not_by_registration():
    def run(net, x):
        return net.norm_a(net.b(net.norm_b(net.a(x))))

    parts = {"norm_a": nn.BatchNorm1d(3), "a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "norm_b": nn.BatchNorm1d(3)}
    model = ready(Net(run, **parts))
    x = batch(6, 3)
    folded, folds = fold_batch_norm(model, x)
    assert [(fold.module, fold.into, fold.reason) for fold in folds] == [("norm_a", "b", ""), ("norm_b", "a", "")]
    torch.testing.assert_close(outputs(folded, x), outputs(model, x))


def test_a_neighbour_by_registration_alone_is_not_folded():
    model = pair(lambda net, x: net.norm(x) + net.conv(x))
    _, (fold,) = fold_batch_norm(model, batch(2, 3, 5))
    assert fold.into is None


def test_each_norm_has_its_entry_and_one_refusal_stops_no_other():
    blocks = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)]
    model = ready(nn.Sequential(*blocks))
    x = batch(6, 4)
    folded, folds = fold_batch_norm(model, x)
    assert [(fold.module, fold.into, bool(fold.reason)) for fold in folds] == [
        ("1", "0", False),
        ("3", folds[1].into, True),
        ("5", "4", False),
    ]
    torch.testing.assert_close(outputs(folded, x), outputs(model, x))


def test_only_the_first_of_two_norms_in_a_row_is_folded():
    model = ready(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)))
    x = batch(6, 4)
    folded, folds = fold_batch_norm(model, x)
    assert [fold.reason == "" for fold in folds] == [True, False]
    torch.testing.assert_close(outputs(folded, x), outputs(model, x))
    again, (fold,) = fold_batch_norm(folded, x)
    assert (fold.module, fold.into, fold.reason) == ("2", "0", "")
    torch.testing.assert_close(outputs(again, x), outputs(model, x))


def test_a_norm_behind_an_identity_is_fed_by_the_layer():
    model = ready(nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.BatchNorm1d(4)))
    folded, (fold,) = fold_batch_norm(model, batch(6, 4))
    assert fold == Fold("2", "batch_norm", "0", "")
    torch.testing.assert_close(outputs(folded, batch(6, 4)), outputs(model, batch(6, 4)))


@pytest.mark.parametrize("conv", [nn.Conv1d(3, 3, 1), nn.Linear(3, 3)])
@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_a_norm_with_half_of_its_affine_map_is_folded(missing, conv):
    model = pair(norm_of_conv, conv=conv)
    setattr(model.norm, missing, None)
    x = batch(*(6, 3, 5)[: model.conv.weight.ndim])
    torch.testing.assert_close(outputs(fold_batch_norm(model, x)[0], x), outputs(model, x))


def test_folded_weights_are_computed_in_float64_and_rounded_once():
    model = pair(norm_of_conv)
    single = copy.deepcopy(model).float()
    reference = copy.deepcopy(single).double()  # the same numbers, with room to compute
    for net, dtype in ((single, torch.float32), (copy.deepcopy(single).half(), torch.float16)):
        wide = reference if dtype is torch.float32 else copy.deepcopy(net).double()
        folded, _ = fold_batch_norm(net, batch(2, 3, 5, dtype=dtype))
        exact, _ = fold_batch_norm(wide, batch(2, 3, 5))
        for name in ("weight", "bias"):
            got, expected = getattr(folded.conv, name), getattr(exact.conv, name)
            assert is_same(got.detach(), expected.detach().to(dtype))


def test_the_formula_by_hand():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, eps=1.0)).double().eval()
    values = {"0.weight": [[3.0]], "0.bias": [5.0], "1.weight": [8.0], "1.bias": [7.0], "1.running_mean": [1.0]}
    model.load_state_dict(
        {k: torch.tensor(v) for k, v in values.items()} | {"1.running_var": torch.tensor([15.0])}, False
    )
    folded, _ = fold_batch_norm(model, batch(2, 1))
    assert folded[0].weight.item() == 3 * 8 / 4  # w gamma / sqrt(15 + 1)
    assert folded[0].bias.item() == 7 + (5 - 1) * 8 / 4


@pytest.mark.parametrize("fold", [fold_batch_norm, fold_relu])
def test_the_given_model_stays_as_it_is(fold):
    model = pair(lambda net, x: F.relu(norm_of_conv(net, x)))
    model.conv.weight.requires_grad_(False)
    before = fingerprint(model)
    folded, _ = fold(model, batch(2, 3, 5))
    assert fingerprint(model) == before
    assert not any(module.training for module in folded.modules())
    assert not ({id(m) for m in folded.modules()} & {id(m) for m in model.modules()})
    assert not folded.conv.weight.requires_grad


@pytest.mark.parametrize("fold", [fold_batch_norm, fold_relu])
def test_the_given_model_stays_as_it_is_when_it_fails(fold):
    def run(net, x):
        norm_of_conv(net, x)
        raise Broken

    model = pair(run)
    before = fingerprint(model)
    with pytest.raises(ModelError, match="layer `conv`, batch 0") as caught:
        fold(model, batch(2, 3, 5))
    assert isinstance(caught.value.__cause__, Broken)
    assert fingerprint(model) == before


@pytest.mark.parametrize("fold", [fold_batch_norm, fold_relu])
def test_training_mode_is_refused(fold):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    model[1].train()
    with pytest.raises(InvalidInputError, match="got 1 in training mode"):
        fold(model, batch(4, 2))


@pytest.mark.parametrize("fold", [fold_batch_norm, fold_relu])
def test_batches_are_passed_like_anywhere_else(fold):
    model = pair(lambda net, x, shift: net.norm(net.conv(x)) + shift)
    if fold is fold_relu:
        model.run = lambda net, x, shift: F.relu(net.conv(x)) + shift
    x, shift = batch(2, 3, 5), torch.ones(())
    for given in ((x, shift), [x, shift], {"shift": shift, "x": x}):
        assert fold(model, given)[1][0].into == "conv"
    assert fold(model, {"image": x}, forward=lambda model, item: model(item["image"], shift))[1][0].into == "conv"


JOINED = {
    "module": (lambda net, x: net.relu(net.conv(x)), {"relu": nn.ReLU()}),
    "inplace": (lambda net, x: net.relu(net.conv(x)), {"relu": nn.ReLU(inplace=True)}),
    "ReLU6": (lambda net, x: net.relu(net.conv(x)), {"relu": nn.ReLU6()}),
    "F.relu": (lambda net, x: F.relu(net.conv(x)), {}),
    "torch.relu": (lambda net, x: torch.relu(net.conv(x)), {}),
    "method": (lambda net, x: net.conv(x).relu(), {}),
    "F.relu in place": (lambda net, x: F.relu(net.conv(x), inplace=True), {}),
    "torch.relu in place": (lambda net, x: torch.relu_(net.conv(x)), {}),
    "method in place": (lambda net, x: net.conv(x).relu_(), {}),
    "in place, then used twice": (after_conv(lambda net, y: F.relu(y, inplace=True) + y), {}),
    "F.relu6": (lambda net, x: F.relu6(net.conv(x)), {}),
    "F.relu6 in place": (lambda net, x: F.relu6(net.conv(x), inplace=True), {}),
    "hardtanh to ReLU6": (lambda net, x: F.hardtanh(net.conv(x), 0, 6), {}),
    "Hardtanh module to ReLU6": (lambda net, x: net.act(net.conv(x)), {"act": nn.Hardtanh(0, 6, inplace=True)}),
    "through an identity": (lambda net, x: net.relu(net.skip(net.conv(x))), {"relu": nn.ReLU(), "skip": nn.Identity()}),
    "layer called twice": (lambda net, x: net.relu(net.conv(net.relu(net.conv(x)))), {"relu": nn.ReLU()}),
    "relu output used twice": (after_conv(lambda net, y: torch.cat([net.relu(y)] * 2)), {"relu": nn.ReLU()}),
}
SEPARATE = {
    "no relu": (lambda net, x: net.conv(x), {}),
    "relu before": (lambda net, x: net.conv(net.relu(x)), {"relu": nn.ReLU()}),
    "relu of the sum": (lambda net, x: net.relu(net.conv(x) + x), {"relu": nn.ReLU()}),
    "sum in place": (lambda net, x: net.relu(net.conv(x).add_(x)), {"relu": nn.ReLU()}),
    "used elsewhere": (after_conv(lambda net, y: net.relu(y) - y), {"relu": nn.ReLU()}),
    "used elsewhere before": (after_conv(lambda net, y: y.exp() + F.relu(y)), {}),
    "returned too": (after_conv(lambda net, y: [net.relu(y), y][1]), {"relu": nn.ReLU()}),
    "once with and once without": (lambda net, x: net.conv(net.relu(net.conv(x))), {"relu": nn.ReLU()}),
    "one call kept aside": (lambda net, x: [F.relu(net.conv(-x)), setattr(net, "kept", net.conv(x))][0], {}),
    "two different": (lambda net, x: F.relu6(net.conv(x)) + F.relu(net.conv(-x)), {}),
    "norm between": (lambda net, x: net.relu(net.norm(net.conv(x))), {"relu": nn.ReLU()}),
    "view changed in place": (after_conv(lambda net, y: [y.view(-1).relu_(), y][1]), {}),
    "half changed in place": (after_conv(lambda net, y: [y.chunk(2)[0].relu_(), y][1]), {}),
    "used before a relu in place": (after_conv(lambda net, y: y.exp() + y.relu_()), {}),
    "kept before a relu in place": (after_conv(lambda net, y: [z := y.clone(), F.relu(y, inplace=True) - z][1]), {}),
    "hardtanh": (lambda net, x: F.hardtanh(net.conv(x)), {}),
    "hardtanh to 5": (lambda net, x: F.hardtanh(net.conv(x), 0, 5), {}),
    "leaky": (lambda net, x: net.relu(net.conv(x)), {"relu": nn.LeakyReLU()}),
    "never called": (lambda net, x: x, {}),
}


@pytest.mark.parametrize("case", JOINED)
def test_a_layer_is_joined_with_its_relu(case):
    run, modules = JOINED[case]
    model = pair(run, **modules)
    x = 5 * batch(2, 3, 5)
    expected = outputs(model, x)
    joined, folds = fold_relu(model, x)
    kind = "relu6" if "ReLU6" in case or "relu6" in case else "relu"
    assert folds == [Fold("relu" if "relu" in modules else "conv", kind, "conv", "")]
    assert isinstance(joined.conv, LayerReLU)
    low, high = outputs(joined.conv, x).aminmax()
    assert low == 0
    assert (high == 6) == (kind == "relu6")
    assert is_same(outputs(joined, x), expected)
    assert joined.conv.weight is joined.conv.layer.weight


@pytest.mark.parametrize("case", SEPARATE)
def test_a_layer_is_not_joined_where_a_relu_is_not_all_that_follows(case):
    run, modules = SEPARATE[case]
    model = pair(run, **modules)
    x = 5 * batch(2, 3, 5)
    separate, folds = fold_relu(model, x)
    assert folds == []
    assert type(separate.conv) is nn.Conv1d
    assert is_same(outputs(separate, x), outputs(model, x))


def test_a_residual_block_that_reuses_its_relu_is_joined_only_before_the_sum():
    def block(net, x):
        y = net.relu(net.norm(net.conv(x)))
        return net.relu(net.last(net.second(y)) + x)

    model = pair(block, relu=nn.ReLU(inplace=True), second=nn.Conv1d(3, 3, 3, padding=1), last=nn.BatchNorm1d(3))
    x = batch(2, 3, 5)
    folded, norms = fold_batch_norm(model, x)
    joined, relus = fold_relu(folded, x)
    assert [(fold.module, fold.into, fold.reason) for fold in norms] == [("norm", "conv", ""), ("last", "second", "")]
    assert relus == [Fold("relu", "relu", "conv", "")]
    assert [type(joined.conv), type(joined.second)] == [LayerReLU, nn.Conv1d]
    torch.testing.assert_close(outputs(joined, x), outputs(model, x))


def test_one_relu_serves_several_layers():
    model = ready(nn.Sequential(nn.Linear(4, 4), relu := nn.ReLU(), nn.Linear(4, 4), relu))
    joined, folds = fold_relu(model, batch(9, 4))
    assert [(fold.module, fold.into) for fold in folds] == [("1", "0"), ("1", "2")]
    assert is_same(outputs(joined, batch(9, 4)), outputs(model, batch(9, 4)))


def test_joining_twice_is_the_same_as_once():
    model = ready(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU6(), nn.Linear(4, 4)))
    x = batch(9, 4)
    once, _ = fold_relu(fold_batch_norm(model, x)[0], x)
    twice, folds = fold_relu(once, x)
    assert folds == []
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    assert is_same(outputs(twice, x), outputs(once, x))


def test_nothing_is_folded_into_a_joined_layer():
    model = ready(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4)))
    x = batch(9, 4)
    joined, _ = fold_relu(model, x)
    folded, (fold,) = fold_batch_norm(joined, x)
    assert fold.reason != ""
    assert is_same(outputs(folded, x), outputs(model, x))


# --- uses that are hard to see ---


def scripted_add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a + b


def plain_list():
    model = pair(lambda net, x: net.stages[0][1](net.stages[0][0](x)))
    model.stages = [(model.conv, model.norm)]  # as detectron2's FPN holds its convolutions
    return model


def alias():
    norm = nn.BatchNorm1d(3)
    return pair(lambda net, x: net.same(net.conv(x)), norm=norm, same=norm)


def hidden_in(box):
    return pair(after_conv(lambda net, y: box(y, net.norm(y))))


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hidden_in(torch.jit.script(scripted_add))


def failing_on_the_way(net, x):
    y = net.conv(x)
    z = net.norm(y)
    try:
        net.other(x[:, :1])
    except RuntimeError:
        z = z + y
    return z


BUGS = {
    "norm with two names": (alias, (2, 3, 5)),
    "modules also held in a plain list": (plain_list, (2, 3, 5)),
    "unbatched Conv1d": (lambda: pair(norm_of_conv), (3, 3)),
    "unbatched Conv2d": (lambda: pair(norm_of_conv, conv=nn.Conv2d(2, 3, 1)), (2, 3, 5)),
    "used by a scripted function": (scripted, (2, 3, 5)),
    "used inside vmap": (lambda: hidden_in(lambda y, z: torch.vmap(torch.neg)(y) + z), (2, 3, 5)),
    "returned in an object": (lambda: hidden_in(lambda y, z: types.SimpleNamespace(y=y, z=z)), (2, 3, 5)),
    "forward called directly": (lambda: pair(lambda net, x: norm_of_conv(net, x) + net.conv.forward(x)), (2, 3, 5)),
    "after a layer that failed": (lambda: pair(failing_on_the_way, other=nn.Conv1d(3, 3, 1)), (2, 3, 5)),
}


@pytest.mark.parametrize("case", BUGS)
def test_folding_keeps_the_output_also_where_it_is_hard_to_see(case):
    build, shape = BUGS[case]
    model, x = build(), batch(*shape)
    expected, got = outputs(model, x), outputs(fold_batch_norm(model, x)[0], x)
    if isinstance(expected, types.SimpleNamespace):
        expected, got = expected.y, got.y
    torch.testing.assert_close(got, expected)


def test_the_output_of_the_model_counts_also_where_forward_returns_nothing():
    def forward(model, x):
        model(x)

    model = pair(after_conv(lambda net, y: (y, net.norm(y))))
    x = batch(2, 3, 5)
    torch.testing.assert_close(outputs(fold_batch_norm(model, x, forward=forward)[0], x), outputs(model, x))


def test_hooks_of_a_relu_run_once():
    model = pair(lambda net, x: net.relu(net.conv(x)), relu=nn.ReLU())
    model.relu.register_forward_hook(lambda module, args, output: output * 2)
    x = batch(2, 3, 5)
    torch.testing.assert_close(outputs(fold_relu(model, x)[0], x), outputs(model, x))


def test_a_layer_whose_hook_returns_a_tuple_is_left_alone():
    model = pair(lambda net, x: net.norm(net.conv(x)[0]))
    model.conv.register_forward_hook(lambda module, args, output: (output, 1))
    fold_batch_norm(model, batch(2, 3, 5))


# --- deciding and applying apart ---


def plan_model():
    """Return a network of which a BatchNorm and ReLUs of every form can be folded, and another BatchNorm cannot."""

    def run(net, x):
        y = F.relu6(net.norm(net.conv(x)))
        y = net.act(net.second(y))
        y = net.relu6(net.third(y))
        return net.free(net.fourth(y).relu_() + x)

    parts = {f"{name}": nn.Conv1d(3, 3, 3, padding=1) for name in ("second", "third", "fourth")}
    return pair(run, **parts, act=nn.ReLU(inplace=True), relu6=nn.ReLU6(), free=nn.BatchNorm1d(3))


PLAN = [
    Fold("norm", "batch_norm", "conv", ""),
    Fold("free", "batch_norm", None, "no convolution or linear layer feeds it directly"),
    Fold("conv", "relu6", "conv", ""),
    Fold("act", "relu", "second", ""),
    Fold("relu6", "relu6", "third", ""),
    Fold("fourth", "relu", "fourth", ""),
]  # fmt: skip


def test_a_plan_comes_from_one_batch_and_is_applied_without_any():
    model, x = plan_model(), 4 * batch(2, 3, 9)
    before = fingerprint(model)
    folds = examine(model, x).folds
    assert folds == PLAN
    written = json.loads(json.dumps(folds))
    folded = apply_folds(plan_model(), [Fold(*entry) for entry in written])
    assert [type(folded.get_submodule(fold.into)) for fold in PLAN[2:]] == [LayerReLU] * 4
    assert [type(layer.relu) for layer in (folded.conv, folded.third, folded.fourth)] == [nn.ReLU6, nn.ReLU6, nn.ReLU]
    for other in (x, 4 * batch(3, 3, 9, seed=1)):
        expected = outputs(model, other)
        assert (outputs(folded, other) - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert fingerprint(model) == before


def test_a_plan_is_that_of_the_two_functions_one_after_the_other():
    model, x = plan_model(), 4 * batch(2, 3, 9)
    folded, norms = fold_batch_norm(model, x)
    joined, relus = fold_relu(folded, x)
    assert examine(model, x).folds == norms + relus
    assert is_same(outputs(joined, x), outputs(apply_folds(model, PLAN), x))


def test_nothing_is_applied_that_was_left_alone():
    model, x = plan_model(), batch(2, 3, 9)
    same = apply_folds(model, [fold._replace(reason="left alone") for fold in PLAN])
    assert same is not model
    assert [type(m) for m in same.modules()] == [type(m) for m in model.modules()]
    assert is_same(outputs(same, x), outputs(model, x))


@pytest.mark.parametrize(
    ("fold", "message"),
    [
        (Fold("gone", "batch_norm", "conv", ""), "which has no module `gone`"),
        (Fold("norm", "batch_norm", "gone", ""), "which has no module `gone`"),
        (Fold("norm", "batch_norm", None, ""), "which has no module `None`"),
        (Fold("act", "batch_norm", "conv", ""), "got a ReLU at `act`"),
        (Fold("norm", "batch_norm", "act", ""), "got a ReLU at `act`"),
        (Fold("norm", "relu", "conv", ""), "got a BatchNorm1d at `norm`"),
        (Fold("act", "relu6", "conv", ""), "got a ReLU at `act`"),
        (Fold("act", "relu", "norm", ""), "got a BatchNorm1d at `norm`"),
        (Fold("wide", "batch_norm", "conv", ""), "the 3 channels of `conv`, got `wide`"),
        (Fold("bare", "batch_norm", "conv", ""), "the 3 channels of `conv`, got `bare`"),
        (Fold("act", "gelu", "conv", ""), "got 'gelu'"),
        (Fold("norm", "batch_norm", "odd", ""), "the weight of `odd` must be a parameter"),
    ],
)
def test_folds_of_another_model_are_refused_by_name(fold, message):
    model = plan_model()
    model.wide, model.bare = nn.BatchNorm1d(4).eval(), nn.BatchNorm1d(3, track_running_stats=False).eval()
    model.odd = nn.Conv1d(3, 3, 3).eval()
    del model.odd.weight
    model.odd.register_buffer("weight", torch.ones(3, 3, 3))
    with pytest.raises(InvalidInputError, match=message):
        apply_folds(model, [fold])


def test_two_norms_in_a_row_can_be_applied_one_after_the_other():
    model = ready(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)))
    folded = apply_folds(model, [Fold("1", "batch_norm", "0", ""), Fold("2", "batch_norm", "0", "")])
    torch.testing.assert_close(outputs(folded, batch(5, 4)), outputs(model, batch(5, 4)))


def test_a_fold_that_is_right_but_for_rounding_is_made():
    """The mean cancels a large bias, which costs float32 four of its digits before folding, and none afterwards."""
    model = ready(pair(norm_of_conv, conv=nn.Conv1d(3, 3, 3, padding=1)), dtype=torch.float32)
    model.conv.bias.data += 3e4
    model.norm.running_mean += 3e4
    x = batch(2, 3, 5, dtype=torch.float32)
    folded, (fold,) = fold_batch_norm(model, x)
    assert not fold.reason
    exact = outputs(model.double(), x.double())
    assert (outputs(folded, x) - exact).norm() < 1e-3 * exact.norm()


def test_only_the_fold_that_is_to_blame_is_left_alone():
    """The use of one layer by a scripted function is seen by its effect alone."""
    good = {f"{kind}{k}": make(3, 3) if kind == "fc" else make(3) for k in range(5) for kind, make in
            (("fc", nn.Linear), ("norm", nn.BatchNorm1d))}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        add = torch.jit.script(scripted_add)

    def run(net, x):
        for k in range(5):
            y = net.get_submodule(f"fc{k}")(x)
            x = F.relu(net.get_submodule(f"norm{k}")(y))
            x = add(x, y) if k == 3 else x
        return net.last(x)

    model, x = ready(Net(run, **good, last=nn.Linear(3, 3))), batch(70, 3)
    folds = examine(model, x).folds
    blamed = [fold for fold in folds if fold.reason]
    assert [(fold.module, fold.kind, fold.reason) for fold in blamed] == [
        ("norm3", "batch_norm", "folding changes the output of the model or makes it fail"),
        ("fc3", "relu", "folding changes the output of the model or makes it fail"),
    ]
    assert len(folds) == 10
    torch.testing.assert_close(outputs(apply_folds(model, folds), x), outputs(model, x))


def test_reading_the_shape_or_dtype_of_a_weight_is_no_use():
    model = pair(lambda net, x: net.norm(net.conv(x.to(net.conv.weight.dtype))).reshape(-1, net.conv.weight.shape[0]))
    assert [fold.reason for fold in examine(model, batch(2, 3, 5)).folds] == [""]


def test_folds_that_are_wrong_only_together_are_not_both_kept():
    assert _sound(lambda chosen: not {"b", "d"} <= set(chosen), [], ["a", "b", "c", "d"]) == ["a", "b", "c"]


def test_a_layer_with_hooks_is_not_joined():
    model = pair(lambda net, x: F.relu(net.conv(x)))
    model.conv.register_forward_hook(lambda module, args, output: output * 2)
    assert fold_relu(model, batch(2, 3, 5))[1] == []


def test_a_model_that_does_not_repeat_itself_is_left_alone_with_that_reason():
    model = pair(lambda net, x: F.dropout(norm_of_conv(net, x), 0.5, training=True))
    (fold,) = examine(model, batch(4, 3, 9)).folds
    assert "different output each time" in fold.reason


def test_lazy_layers_are_refused_by_name():
    with pytest.raises(InvalidInputError, match="`0`: a LazyLinear"):
        examine(nn.Sequential(nn.LazyLinear(2)).eval(), batch(2, 3))


# --- what computes in floating point ---


def functional(use, **modules):
    return ready(Net(use, fc=nn.Linear(4, 4), **modules))


PRODUCTS = {
    "linear": lambda net, x: F.linear(x, net.kernel),
    "conv1d": lambda net, x: F.conv1d(x, net.kernel[:, :, None]),
    "conv_transpose1d": lambda net, x: F.conv_transpose1d(x, net.kernel[:, :, None]),
    "matmul": lambda net, x: x @ net.kernel,
    "bmm": lambda net, x: x.bmm(x),
    "baddbmm": lambda net, x: torch.baddbmm(x, x, x),
    "mm": lambda net, x: torch.ops.aten.mm(x[0], net.kernel),
    "addmm": lambda net, x: x[0].addmm_(x[0], net.kernel),
    "einsum": lambda net, x: torch.einsum("bij,jk", x, net.kernel),
    "scaled_dot_product_attention": lambda net, x: F.scaled_dot_product_attention(x, x, x),
}
FLOATS = {
    "bilinear": lambda net, x: F.bilinear(x, x, net.kernel.expand(4, 4, 4)),
    "embedding": lambda net, x: F.embedding(x.long().abs() % 4, net.kernel),
    "tensordot": lambda net, x: torch.tensordot(x, net.kernel, 1),
    "multi_dot": lambda net, x: torch.linalg.multi_dot([x[0], net.kernel, net.kernel]),
    "einsum": lambda net, x: torch.einsum("bij,jk,kl", x, net.kernel, net.kernel),
    "mm": lambda net, x: x[0].long() @ net.kernel.long(),
}
FLOATS["matmul"] = FLOATS.pop("mm")
FLOATS["linalg_multi_dot"] = FLOATS.pop("multi_dot")
BOTH = ("bmm", "baddbmm")


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_outside_layers_are_found_with_the_module_that_computes_them(name):
    inner = functional(PRODUCTS[name])
    inner.kernel = nn.Parameter(torch.eye(4, dtype=torch.float64))
    model = functional(lambda net, x: net.inner(net.fc(x)), inner=nn.Sequential(inner)).eval()
    before = fingerprint(model)
    operands = "query key weights value" if "attention" in name else "input other" if name in BOTH else "input"
    weight = "" if name in BOTH or "attention" in name else "inner.0.kernel"
    assert examine(model, batch(4, 4, 4)) == Examination([], {}, [Product("inner.0", name, 0, operands, weight)], {})
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", FLOATS)
def test_other_products_are_named_with_the_module_that_computes_them(name):
    inner = functional(FLOATS[name])
    inner.kernel = nn.Parameter(torch.eye(4, dtype=torch.float64))
    model = functional(lambda net, x: net.inner(net.fc(x)), inner=nn.Sequential(inner)).eval()
    before = fingerprint(model)
    assert examine(model, batch(4, 4, 4)) == Examination([], {"inner.0": f"{name} computes in floating point"}, [], {})
    assert fingerprint(model) == before


def test_functions_are_named_once_in_the_order_of_their_calls_and_the_root_has_the_empty_name():
    model = functional(
        lambda net, x: torch.tensordot(torch.tensordot(net.fc(x), x[0], 1), x[0], 1) + x[0, 0].dot(x[0, 0])
    )
    assert examine(model, batch(4, 4, 4)).skipped == {"": "tensordot, dot computes in floating point"}


def test_what_is_done_outside_the_model_is_not_the_models():
    model = functional(lambda net, x: net.fc(x))
    assert examine(model, batch(4, 4), forward=lambda model, x: model(x @ x)).skipped == {}


def test_a_module_that_is_skipped_is_not_named_again_for_what_it_computes():
    attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
    model = functional(lambda net, x: net.both(net.attend(x, x, x)[0], x), attend=attention, both=nn.Bilinear(4, 4, 4))
    skipped = examine(model, batch(5, 4, 4)).skipped
    assert list(skipped) == ["attend", "both"]
    assert "projections" in skipped["attend"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fast_path_of_a_transformer_encoder_does_not_hide_its_layers(norm_first):
    """In eval mode it computes everything in one kernel, and packs a padded batch into a nested tensor."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = ready(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first))
    given = {"src": batch(3, 5, 8), "src_key_padding_mask": torch.arange(5) >= torch.tensor([[3], [5], [4]])}
    used, before = ~given["src_key_padding_mask"], fingerprint(model)
    found = examine(model, given)
    assert [(fold.module, fold.kind) for fold in found.folds] == [(f"layers.{k}.linear1", "relu") for k in range(2)]
    assert found.skipped == {}
    assert [product.module for product in found.products] == [f"layers.{k}.self_attn" for k in range(2)]
    folded, called = apply_folds(model, found.folds), []
    for name in ("linear1", "linear2"):
        folded.layers[1].get_submodule(name).register_forward_hook(lambda module, args, y: called.append(y.is_nested))
    expected, got = outputs(model, **given)[used], outputs(folded, **given)[used]
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert called == [False, False]
    assert fingerprint(model) == before


def test_an_examination_can_be_written_down():
    found = examine(plan_model(), batch(2, 3, 9))
    assert json.loads(json.dumps(found._asdict())) == {
        "folds": [list(fold) for fold in PLAN], "skipped": {}, "products": [], "calls": {}
    }  # fmt: skip
