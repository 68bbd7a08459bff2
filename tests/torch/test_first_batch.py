"""What the first batch meets: errors of the model, odd outputs, TorchScript, no layer at all."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from klquant.backends.torch import equalize, fold_batch_norm, quantize
from klquant.backends.torch.folding.api import examine
from klquant.backends.torch.model.dataflow import outputs_agree
from klquant.errors import CalibrationWarning, InvalidInputError, ModelError
from support.networks import Net, batch, mlp, outputs, ready

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
X = batch(40, 4, dtype=torch.float32)
INF, NAN, LOWEST = torch.inf, torch.nan, torch.finfo(torch.float32).min


def tensors(*values):
    return [torch.tensor(values)]


# Outputs that are compared


@pytest.mark.parametrize("fill", [-INF, INF, NAN, LOWEST, -1e9, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_masks_are_filled_with_does_not_loosen_the_comparison(fill, dtype):
    one = [torch.tensor([1.0, fill, 3.0]).to(dtype)]
    assert outputs_agree(one, one)
    assert outputs_agree([one[0] * torch.tensor([1 + torch.finfo(dtype).eps, 1, 1], dtype=dtype)], one)
    assert not outputs_agree([torch.tensor([2.0, fill, 3.0]).to(dtype)], one)
    assert not outputs_agree([torch.tensor([fill, 1.0, 3.0]).to(dtype)], one)
    assert not outputs_agree([torch.tensor([1.0, 1.0, 3.0]).to(dtype)], one)


def test_values_that_are_not_finite_must_be_the_same():
    for value in (INF, -INF, NAN):
        assert outputs_agree(tensors(value, value), tensors(value, value))
        for other in (INF, -INF, NAN, 0.0):
            assert outputs_agree(tensors(value), tensors(other)) == (str(value) == str(other))
            assert outputs_agree(tensors(other), tensors(value)) == (str(value) == str(other))


def test_large_outputs_and_complex_ones_are_compared_up_to_rounding():
    assert outputs_agree(tensors(1e6, 1.001), tensors(1.00001e6, 1.0))
    assert not outputs_agree(tensors(1.1e6), tensors(1e6))
    assert outputs_agree(tensors(1 + 1j, complex(NAN, 1)), tensors(1.00001 + 1j, complex(NAN, 1)))
    assert not outputs_agree(tensors(1 + 1j), tensors(1 + 2j))
    assert not outputs_agree(tensors(1.0), [torch.ones(1).double()])
    assert outputs_agree([torch.empty(0)], [torch.empty(0)])
    assert not outputs_agree(tensors(1, 2), tensors(1, 3))


ODD = {
    "masked logits": lambda y: y.masked_fill(torch.arange(3) == 1, -INF),
    "lowest value": lambda y: y.masked_fill(torch.arange(3) == 1, LOWEST),
    "boxes of nothing": lambda y: {"boxes": torch.full((2, 4), NAN), "scores": y},
    "all NaN": lambda y: y * NAN,
    "softmax of a masked row": lambda y: (y, torch.full((1, 3), -INF).softmax(-1)),
    "one is divided by zero": lambda y: torch.cat([y, 1 / torch.zeros(1, 3)]),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_outputs_do_not_stop_the_folding(case):
    model = ready(Net(lambda net, x: ODD[case](net.inner(x)), inner=mlp()), dtype=torch.float32)
    result = quantize(model, [X])
    assert [fold.reason for fold in result.folds] == ["", ""]
    assert result.thresholds.keys() == {"inner.first", "inner.second"}


@pytest.mark.parametrize("case", ["masked logits", "lowest value", "boxes of nothing"])
def test_a_wrong_fold_is_seen_beside_odd_values(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hidden = torch.jit.script(_triple)
    parts = {"fc": nn.Linear(4, 3), "norm": nn.BatchNorm1d(3)}
    model = ready(Net(lambda net, x: ODD[case](net.norm(y := net.fc(x)) + hidden(y)), **parts), dtype=torch.float32)
    _, (fold,) = fold_batch_norm(model, X)
    assert "changes the output" in fold.reason


def _triple(y: torch.Tensor) -> torch.Tensor:
    return y * 3.0


def test_weights_that_are_nan_are_named():
    model = mlp()
    model.second.weight.data[0, 0] = NAN
    with pytest.raises(InvalidInputError, match="layer `second`: weights must be finite"):
        quantize(model, [X])


# TorchScript


def scripted(how, module, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and models hold it
        if how == "trace":
            return torch.jit.trace(module.eval(), x)
        found = torch.jit.script(module.eval())
        return torch.jit.freeze(found) if how == "freeze" else found


@pytest.mark.parametrize("how", ["script", "trace", "freeze"])
def test_torchscript_in_a_model_is_named(how):
    inner = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
    parts = {"fc": nn.Linear(4, 6), "script": scripted(how, inner, torch.ones(2, 6)), "last": nn.Linear(6, 2)}
    model = Net(lambda net, x: net.last(F.relu(net.script(net.fc(x)))), **parts)
    [part.eval() for part in (parts["fc"], parts["last"])]
    model.training = False
    with pytest.warns(CalibrationWarning, match="`script` stays in floating point: .*TorchScript"):
        result = quantize(model, [X, X])
    assert result.skipped.keys() == {"script"}
    assert result.thresholds.keys() == {"fc", "last"}
    expected = outputs(model, X)
    assert outputs(result.model, X).sub(expected).norm() < 0.2 * expected.norm()
    equalize(model, X)


def test_what_torchscript_takes_counts_as_a_use():
    parts = {"fc": nn.Linear(4, 6), "norm": nn.BatchNorm1d(6), "script": scripted("script", nn.Tanh(), None)}
    model = ready(Net(lambda net, x: net.norm(y := net.fc(x)) + net.script(y), **parts))
    _, (fold,) = fold_batch_norm(model, X.double())
    assert fold.reason == "the output of its layer is used elsewhere too"


@pytest.mark.parametrize("how", ["script", "trace", "freeze"])
def test_torchscript_as_the_model_is_refused(how):
    with pytest.raises(InvalidInputError, match="got TorchScript"):
        quantize(scripted(how, nn.Linear(4, 4), X), [X])


# Errors


SHAPES = r"Tensor\[40,4\]"
WRONG_CALLS = {
    "two inputs": ((X, X), rf"batches are \({SHAPES}, {SHAPES}\); .*: model\(batch\[0\]\)"),
    "a list of them": ([X, X], rf"batches are \[{SHAPES}, {SHAPES}\]; .*: model\(batch\[0\]\)"),
    "a dict": ({"a": X, "b": X}, rf"batches are {{'a': {SHAPES}, 'b': {SHAPES}}}; .*: model\(batch\['a'\]\)"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
@pytest.mark.parametrize("run", [examine, fold_batch_norm, lambda model, data: quantize(model, [data])])
def test_a_batch_that_does_not_fit_the_call_gives_a_hint(case, run):
    data, hint = WRONG_CALLS[case]
    model = ready(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), dtype=torch.float32)
    with pytest.raises(ModelError, match=f"^batch 0: .*TypeError.*{hint}") as caught:
        run(model, data)
    assert isinstance(caught.value.__cause__, TypeError)
    quantize(model, [data], forward=lambda model, batch: model(batch[0] if isinstance(batch, (tuple, list)) else X))


@pytest.mark.parametrize("run", [examine, fold_batch_norm, equalize, lambda model, data: quantize(model, [data])])
def test_a_failing_layer_is_named(run):
    with pytest.raises(ModelError, match=r"^layer `first`, batch 0: the model failed there or later") as caught:
        run(mlp(), torch.ones(2, 5))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "forward=" not in str(caught.value)


def test_arrays_and_the_users_own_way_to_call_fail_with_layer_and_batch():
    with pytest.raises(ModelError, match=r"^layer `first`, batch 0: .*TypeError"):
        quantize(mlp(), [X.numpy()])
    with pytest.raises(ModelError, match=r"^batch 0: .*KeyError: 'x'$"):
        quantize(mlp(), [{}], forward=lambda model, batch: model(batch["x"]))
    with pytest.raises(ModelError, match=r"^layer `second`, batch 0: .*ValueError: late"):
        quantize(mlp(), [X], forward=_fail_late)


def _fail_late(model, x):
    model(x)
    raise ValueError("late")


# No layer


NO_LAYERS = {
    "none": (nn.Sequential(nn.ReLU()), "the model has no convolution or linear layer of a plain type$"),
    "the model is an embedding": (nn.Embedding(3, 2), "; the table of an embedding is not quantized$"),
    "the model is recurrent": (nn.GRU(4, 2), "; recurrent layers are not quantized$"),
    "functions": (Net(lambda net, x: x.inner(x)), "; inner computes in floating point$"),
    "only a norm": (nn.BatchNorm1d(4), "of a plain type$"),
}


@pytest.mark.parametrize("case", NO_LAYERS)
def test_a_model_without_layers_is_refused_with_the_reason(case):
    model, reason = NO_LAYERS[case]
    data = torch.zeros(2, 1, dtype=torch.int64) if "embedding" in case else X
    with pytest.raises(InvalidInputError, match=f"expected layers that can be quantized, got none: .*{reason}"):
        quantize(model.eval(), [data])


def test_what_a_model_without_layers_has_inside_is_named():
    with pytest.warns(CalibrationWarning, match="layer `0` stays in floating point: the table of an embedding"):
        assert quantize(nn.Sequential(nn.Embedding(3, 2)).eval(), [torch.zeros(2, 1).long()]).thresholds == {}


def test_functions_of_the_model_itself_are_not_named_by_an_empty_name():
    model = ready(Net(lambda net, x: net.fc(x).inner(x), fc=nn.Linear(4, 4)), dtype=torch.float32)
    with pytest.warns(CalibrationWarning, match=r"layer `\(the model itself\)` stays in floating point: inner"):
        assert quantize(model, [X]).skipped.keys() == {""}


def test_a_model_whose_layers_are_all_excluded_is_refused():
    with pytest.raises(InvalidInputError, match="got none: 2 are excluded"):
        quantize(mlp(), [X], exclude="*")
