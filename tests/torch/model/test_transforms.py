"""Models that use the transforms of torch.func."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from klquant.backends.torch import Quantizer, quantize, requantize
from klquant.backends.torch.model.forward import run_observed
from klquant.errors import CalibrationWarning
from support.networks import Net, batch, outputs, ready

pytestmark = pytest.mark.filterwarnings(
    "ignore:layer .*(T =|expected SQNR|it was never called):klquant.errors.CalibrationWarning"
)
X = batch(6, 8, dtype=torch.float32)
OPTIONS = {"criterion": "max", "num_bins": 255}


def network(run):
    return ready(Net(run, one=nn.Linear(8, 8), two=nn.Linear(8, 8)), dtype=torch.float32)


@pytest.mark.parametrize("axis", [0, 1])
def test_all_samples_inside_vmap_are_observed(axis):
    seen = []
    model = network(lambda net, x: vmap(net.one, in_dims=axis)(x))
    run_observed(model, [X[:, None].expand(6, 8, 8)], lambda name, tensor: seen.append(tensor))
    assert [one.unique().tolist() for one in seen] == [X.unique().tolist()]


LOOPS = {
    "layers": (lambda net, x: vmap(lambda v: net.two(net.one(v).tanh()))(x), lambda net, x: net.two(net.one(x).tanh())),
    "products": (lambda net, x: vmap(lambda v: v @ v.mT)(net.one(x)[None]), lambda net, x: (y := net.one(x)) @ y.mT),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("options", [{}, {"criterion": "auto"}, {"correct_bias": True}, {"observe": "outputs"}])
def test_a_loop_by_vmap_is_quantized_like_the_same_on_whole_batches(name, options):
    results = [quantize(network(run), [X], **{**OPTIONS, **options}) for run in LOOPS[name]]
    got, expected = (outputs(result.model, X).reshape(6, -1) for result in results)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert results[0].skipped == results[1].skipped


def test_layers_inside_vmap_are_diagnosed():
    quantizers = [Quantizer(network(run), num_bins=255) for run in LOOPS["layers"]]
    for quantizer in quantizers:
        quantizer._collect(X, [X], equalize=False)
        quantizer.search_thresholds(criterion="max")
    got, expected = ({layer.name: layer for layer in one.diagnose([X]).layers} for one in quantizers)
    for name, layer in expected.items():
        assert got[name].activation_sqnr_db == pytest.approx(layer.activation_sqnr_db, rel=1e-4)


def test_a_layer_that_is_called_with_other_weights_stays_in_floating_point():
    def run(net, x):
        return functional_call(net.one, {"weight": net.two(x).mT @ x, "bias": net.one.bias}, (x,)).relu()

    model = network(run)
    with pytest.warns(CalibrationWarning, match=r"layer `one` stays in floating point: it runs with other weights"):
        result = quantize(model, [X], **OPTIONS)
    assert result.thresholds.keys() == {"two", ":matmul.0.input", ":matmul.0.other"}
    expected = outputs(model, X)
    assert 0 < (outputs(result.model, X) - expected).norm() < 0.1 * expected.norm()
    with pytest.warns(CalibrationWarning, match=r"layer `one` stays"):
        again = requantize(model, result.calibration)
    assert again.skipped == result.skipped
    assert quantize(model, [X], exclude="one", **OPTIONS).skipped == {"one": "excluded by the settings"}
