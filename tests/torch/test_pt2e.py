"""klquant's thresholds in torchao's PT2E quantization."""

import importlib
import sys
import warnings

import pytest
import torch
from torch import nn

from klquant.backends.torch import quantize
from klquant.demo.digits import load_images, load_network
from klquant.errors import InvalidInputError, MissingDependencyError
from support.networks import batch, ready

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao's own
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    from torchao.testing.pt2e import _xnnpack_quantizer as xnnpack

    from klquant.backends.torch.pt2e import ThresholdObserver, with_thresholds

pytestmark = pytest.mark.filterwarnings("ignore")
X = [batch(16, 3, 8, 8, seed=k, dtype=torch.float32) for k in range(3)]
QUANTIZERS = {
    "x86": (x86.X86InductorQuantizer, x86.get_default_x86_inductor_quantization_config),
    "xnnpack": (xnnpack.XNNPACKQuantizer, xnnpack.get_symmetric_quantization_config),
}


def prepared(model, data, quantizer, **options):
    """Return a model that has seen the data, with klquant's observers unless there are no options."""
    make, config = QUANTIZERS[quantizer]
    chosen = make().set_global(with_thresholds(config(), **options) if options else config())
    program = torch.export.export(model, (data[0][:2],), dynamic_shapes=({0: torch.export.Dim("n")},))
    found = prepare_pt2e(program.module(), chosen)
    with torch.no_grad():
        for one in data:
            found(one)
    return found


def network():
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    return ready(nn.Sequential(*layers), dtype=torch.float32)


def observers(model):
    return [module for module in model.modules() if isinstance(module, ThresholdObserver)]


def sqnr_db(got, expected):
    return float(10 * torch.log10(expected.square().sum() / (got - expected).square().sum()))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("criterion", ["entropy", "max", "percentile", "mse"])
def test_thresholds_are_those_of_one_pass(quantizer, criterion):
    expected = quantize(network(), X, criterion=criterion, passes=1).thresholds
    found = {one.threshold().threshold for one in observers(prepared(network(), X, quantizer, criterion=criterion))}
    assert {one.threshold for one in expected.values()} <= found


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_digits_are_as_good_as_with_torchaos_observers(quantizer):
    digits, model = load_images(), load_network()
    data, given = digits.train_images[:256].split(64), digits.test_images
    with torch.no_grad():
        expected = model(given)
        ours, theirs = (
            convert_pt2e(prepared(model, data, quantizer, **options))(given) for options in ({"guard": True}, {})
        )
    assert sqnr_db(ours, expected) > sqnr_db(theirs, expected) - 0.5
    assert (ours.argmax(1) == digits.test_labels).double().mean() > 0.99


def test_the_guard_can_be_switched_off():
    x = torch.randn(20000, generator=torch.Generator().manual_seed(0)) ** 3
    guarded, literal = ThresholdObserver(), ThresholdObserver(guard=False)
    assert grid(x, guarded)[0] > grid(x, literal)[0]
    assert guarded.threshold().replaced == "entropy"
    assert literal.threshold().criterion == "entropy"
    assert literal.threshold().threshold < guarded.threshold().threshold


def test_compiled_models_run():
    converted = convert_pt2e(prepared(network(), X, "x86", criterion="mse"))
    with torch.no_grad():
        expected = converted(X[0])
        torch.testing.assert_close(torch.compile(converted, backend="aot_eager")(X[0]), expected)


# The observer alone


def grid(x, observer=None, **options):
    observer = observer or ThresholdObserver(**{"criterion": "max", **options})
    for part in x.split(100):
        assert observer(part) is part
    step, zero = observer.calculate_qparams()
    assert (step.shape, step.dtype, zero.shape, zero.dtype) == ((1,), torch.float32, (1,), torch.int64)
    return float(step), int(zero)


POSITIVE, BOTH = torch.linspace(0, 5.1, 1001), torch.linspace(-1.27, 1.27, 1001)
ONE_SIDED = torch.linspace(-1.0, 4.1, 1001)
SYMMETRIC = {"dtype": torch.int8, "qscheme": torch.per_tensor_symmetric}


@pytest.mark.parametrize(
    ("x", "options", "step", "zero"),
    [
        (POSITIVE, {}, 0.02, 0),
        (ONE_SIDED, {}, 0.02, 50),
        (ONE_SIDED, {"dtype": torch.int8}, 0.02, -78),
        (BOTH, {}, 0.01, 128),
        (BOTH, {"dtype": torch.int8, "quant_min": -127, "quant_max": 127}, 0.01, 0),
        (POSITIVE, SYMMETRIC, 5.1 / 127, 0),
        (BOTH, SYMMETRIC, 0.01, 0),
        (BOTH, {"dtype": torch.uint8, "qscheme": torch.per_tensor_symmetric}, 0.01, 128),
        (POSITIVE, {"quant_min": 0, "quant_max": 127}, 5.1 / 127, 0),
        (torch.zeros(10), {}, 1.0, 128),
    ],
)
def test_the_grid_holds_the_values(x, options, step, zero):
    found = grid(x, **options)
    assert found[0] == pytest.approx(step, rel=1e-6)
    assert found[1] == zero


def test_small_steps_and_wrong_options():
    assert grid(BOTH * 1e-9, eps=1e-3)[0] == pytest.approx(1e-3)
    for options, message in [
        ({"is_dynamic": True}, "static quantization of a whole tensor"),
        ({"qscheme": torch.per_channel_symmetric}, "static quantization of a whole tensor"),
        ({"criterion": "kl"}, "`criterion` must be one of"),
    ]:
        with pytest.raises(InvalidInputError, match=message):
            ThresholdObserver(**options)
    with pytest.raises(InvalidInputError, match="got none: run the prepared model"):
        ThresholdObserver().calculate_qparams()
    with pytest.raises(InvalidInputError, match="must be finite, got nan"):
        ThresholdObserver()(torch.tensor([torch.nan]))
    with pytest.raises(InvalidInputError, match="must quantize activations statically"):
        with_thresholds(x86.get_default_x86_inductor_quantization_config(is_dynamic=True))
    with pytest.raises(InvalidInputError, match="`criterion` must be one of"):
        with_thresholds(x86.get_default_x86_inductor_quantization_config(), criterion="auto")


def test_a_specification_takes_the_observer():
    constructor = ThresholdObserver.with_args(criterion="mse")
    spec = QuantizationSpec(torch.uint8, constructor, qscheme=torch.per_tensor_affine)
    made = spec.observer_or_fake_quant_ctr(dtype=spec.dtype, qscheme=spec.qscheme, ch_axis=None)
    assert isinstance(made, ThresholdObserver)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e", None)
    monkeypatch.delitem(sys.modules, "klquant.backends.torch.pt2e")
    with pytest.raises(MissingDependencyError, match=r"pip install 'klquant\[pt2e\]'"):
        importlib.import_module("klquant.backends.torch.pt2e")
