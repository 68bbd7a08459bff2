import warnings

import pytest
import torch
from torch import nn

from klquant.backends.torch import Quantizer, fold_relu, quantize
from klquant.backends.torch.model.quantized import check_float
from klquant.errors import InvalidInputError
from support.networks import batch, mlp

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
X = batch(40, 4, dtype=torch.float32)


def imported(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and models hold them
        return __import__(name, fromlist=["x"])


def with_fake_quantize():
    return nn.Sequential(nn.Linear(4, 4), imported("torch.ao.quantization").FakeQuantize())


def trained_in_int8():
    ao = imported("torch.ao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.Linear(4, 4).train()
        layer.qconfig = ao.get_default_qat_qconfig("fbgemm")
        return nn.Sequential(nn.Linear(4, 4), imported("torch.ao.nn.qat").Linear.from_float(layer))


def dynamic():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Linear(4, 4), imported("torch.ao.nn.quantized.dynamic").Linear(4, 4))


def integer_weight():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize("make", [with_fake_quantize, trained_in_int8, dynamic, integer_weight])
def test_models_that_another_tool_quantized_are_refused_by_layer(make):
    with pytest.raises(InvalidInputError, match="got layer `1`, which is quantized already"):
        quantize(make().eval(), [X])


def test_modules_that_are_always_in_training_mode_are_refused_as_quantized():
    """As quantize_dynamic makes them from a model in eval mode."""
    model = nn.Sequential(nn.Linear(4, 4).eval(), dynamic()[1].train())
    model.training = False
    with pytest.raises(InvalidInputError, match="got layer `1`, which is quantized already"):
        quantize(model, [X])


@pytest.mark.parametrize("observe", ["inputs", "outputs"])
def test_a_simulation_is_not_quantized_again(observe):
    model = quantize(mlp(), [X], observe=observe).model
    with pytest.raises(InvalidInputError, match=r"`first`, which is quantized already \(QuantizedLayer\)"):
        quantize(model, [X])
    with pytest.raises(InvalidInputError, match="quantized already"):
        Quantizer(nn.Sequential(nn.Linear(4, 4), model).eval()).fold(X)


def test_folded_models_and_float_modules_of_quantization_tools_are_not_refused():
    quantized, ao = imported("torch.ao.nn.quantized"), imported("torch.ao.quantization")
    check_float(nn.Sequential(quantized.FloatFunctional(), ao.QuantStub(), nn.Linear(4, 4), ao.DeQuantStub()))
    folded, _ = fold_relu(mlp(), X)
    assert quantize(folded, [X]).thresholds.keys() == {"first", "second"}
