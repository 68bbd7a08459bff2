import importlib.util
import warnings
from collections import Counter

import pytest
import torch
from torch import nn

from klquant.backends.torch import quantize
from klquant.backends.torch.folding.api import examine
from klquant.backends.torch.folding.apply import apply_folds
from klquant.backends.torch.model.dataflow import tensors_in
from klquant.errors import CalibrationWarning
from support.networks import Net, batch, fingerprint, is_same, ready
from support.zoo import ZOO, folding_error, layers, load, outputs_of

WITHOUT = {"bert": "transformers"}  # what a model needs that is no dependency of the backend
MODELS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name in WITHOUT and importlib.util.find_spec(WITHOUT[name]) is None,
            reason=f"{name} needs {WITHOUT.get(name)}, a package of the dev extra",
        ),
    )
    for name in ZOO
]


def reasons(found):
    return {fold.module: fold.reason for fold in found.folds if fold.reason}


def same_keys_and_words(got, expected):
    return got.keys() == expected.keys() and all(words in got[name] for name, words in expected.items())


def quantized(model, batches, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # names what is skipped; that has tests of its own
        return quantize(model, batches, num_bins=255, **options)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_folded_and_what_is_not_and_why(name):
    model, batches = load(name)
    before, known = fingerprint(model), ZOO[name]
    found = examine(model, batches[0])
    folded = {}
    for fold in found.folds:
        if not fold.reason:
            folded[fold.into] = f"{folded.get(fold.into, '')} {fold.kind}".strip()
    assert folded == known.folded
    assert same_keys_and_words(reasons(found), known.left)
    assert same_keys_and_words(found.skipped, known.skipped)
    assert Counter(product.module for product in found.products) == known.products
    norms = {name for name, module in model.named_modules() if "BatchNorm" in type(module).__name__}
    assert norms == {fold.module for fold in found.folds if fold.kind == "batch_norm"}
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_folding_keeps_the_outputs(name):
    model, batches = load(name)
    found = examine(model, batches[0])
    folded = apply_folds(model, found.folds)
    kinds = {n: type(m) for n, m in folded.named_modules()}
    changed = [n for n, m in model.named_modules() if kinds.get(n) is not type(m)]
    assert bool(changed) == bool(ZOO[name].folded or name == "multihead_attention")  # this one gets projections
    assert folding_error(model, folded, batches) <= 1e-10


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_quantized_from_end_to_end(name, observe):
    model, batches = load(name, torch.float32)
    before = fingerprint(model)
    result = quantized(model, batches, observe=observe)
    found = {point for point in result.thresholds if ":" not in point}
    assert {point.partition("@")[0] for point in found} == layers(model) - ZOO[name].uncalled
    calls = {name.rpartition(".")[0] for name in result.thresholds.keys() - found}
    assert Counter(call.partition(":")[0] for call in calls) == ZOO[name].products
    assert result.weight_scales.keys() == layers(model)
    for given in batches:
        expected, got = (list(tensors_in(outputs_of(net, given))) for net in (model, result.model))
        assert [(y.shape, y.dtype) for y in got] == [(y.shape, y.dtype) for y in expected]
        assert all(y.isfinite().all() for y in got)
        assert not all(map(is_same, got, expected))  # it does something
    assert fingerprint(model) == before


# --- memory formats, dtypes and devices ---


def test_channels_last_gives_the_thresholds_of_the_default_format():
    model, batches = load("resnet", torch.float64)
    expected = quantized(model, batches).thresholds
    strided = [x.contiguous(memory_format=torch.channels_last) for x in batches]
    assert not strided[0].is_contiguous()
    got = quantized(model.to(memory_format=torch.channels_last), strided)
    assert got.thresholds.keys() == expected.keys()
    for name, threshold in expected.items():
        assert got.thresholds[name].threshold == pytest.approx(threshold.threshold, rel=1e-9)
    assert outputs_of(got.model, strided[0]).isfinite().all()


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "vit", "transformer_encoder"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_models_are_calibrated_with_statistics_in_float32(name, dtype):
    model, batches = load(name, dtype)
    wide, same = load(name, torch.float32)
    for parameter, narrow in zip(wide.state_dict().values(), model.state_dict().values(), strict=True):
        parameter.copy_(narrow)
    same = [x.to(dtype).float() for x in same]
    result, expected = quantized(model, batches), quantized(wide, same)
    assert {fold[:3] for fold in result.folds if not fold.reason} == {
        fold[:3] for fold in expected.folds if not fold.reason
    }
    assert outputs_of(result.model, batches[0]).dtype == dtype
    assert outputs_of(result.model, batches[0]).isfinite().all()
    for layer, threshold in expected.thresholds.items():
        assert result.thresholds[layer].amax == pytest.approx(threshold.amax, rel=64 * torch.finfo(dtype).eps)
        assert ":" in layer or result.weight_scales[layer].dtype == torch.float32
        assert result.histograms[layer].edges.dtype in ("float32", "float64")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and this machine has none")
@pytest.mark.parametrize("name", MODELS)
def test_models_on_a_gpu(name):
    model, batches = load(name, torch.float32)
    on_gpu = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.cuda(), batches)
    expected, model = quantized(model, batches), model.cuda()
    result = quantized(model, on_gpu)
    assert result.folds == expected.folds
    assert result.thresholds.keys() == expected.thresholds.keys()
    for layer, threshold in expected.thresholds.items():
        assert result.thresholds[layer].amax == pytest.approx(threshold.amax, rel=0.01)  # TF32 convolutions
    got = [y for y in tensors_in(outputs_of(result.model, on_gpu[0])) if y.is_floating_point()]
    assert all(y.is_cuda and y.isfinite().all() for y in got)
    assert next(model.parameters()).is_cuda


def test_a_ragged_last_batch_counts_as_much_as_it_holds():
    model, batches = load("padding_modes", torch.float32)
    assert len(batches[-1]) != len(batches[0])
    result = quantized(model, batches)
    assert result.histograms["0.0"].hist.sum() == sum(x.numel() for x in batches)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_an_encoder_with_a_padding_mask():
    """In eval mode it packs the batch into a nested tensor, which no observer could read."""
    model, batches = load("transformer_encoder", torch.float32)
    given = [{"src": x, "src_key_padding_mask": torch.arange(x.shape[1]) > 1 + torch.arange(len(x))[:, None]}
             for x in batches]  # fmt: skip
    result = quantized(model, given)
    assert {name for name in result.thresholds if ":" not in name} == layers(model)
    for one in given:
        used = ~one["src_key_padding_mask"]
        expected, got = outputs_of(model, one)[used], outputs_of(result.model, one)[used]
        assert 0 < (got - expected).square().mean() < 0.1 * expected.square().mean()


def test_layers_that_are_also_held_in_a_plain_list_are_quantized_where_they_are_called():
    parts = {"conv": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4), "last": nn.Conv2d(4, 2, 1)}
    usual = ready(Net(lambda net, x: net.last(net.norm(net.conv(x)).relu()), **parts), dtype=torch.float32)
    listed = Net(lambda net, x: net.stages[2](net.stages[1](net.stages[0](x)).relu()), **parts).eval()
    listed.stages = list(parts.values())
    x = batch(5, 4, 6, 6, dtype=torch.float32)
    expected, got = quantized(usual, [x]), quantized(listed, [x])
    assert got.thresholds == expected.thresholds
    assert is_same(outputs_of(got.model, x), outputs_of(expected.model, x))
