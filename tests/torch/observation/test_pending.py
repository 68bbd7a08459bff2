"""Statistics that stay on a device until the batch has ended, computed here on the CPU as on a device."""

import pytest
import torch

from klquant.backends.torch import quantize
from klquant.backends.torch.observation import counting, pending
from klquant.errors import InvalidInputError
from support.networks import Net, batch, mlp

pytestmark = pytest.mark.filterwarnings("ignore::klquant.errors.CalibrationWarning")
DATA = [batch(40, 4, seed=k, dtype=torch.float32) for k in range(3)]
OPTIONS = [{}, {"passes": 1}, {"max_amax": 1.5}, {"observe": "outputs"}]


@pytest.fixture
def transfers(monkeypatch):
    """Count on the CPU as on a device; return the number of tensors in each transfer."""
    moved, resolve = [], pending.resolve

    def counted(waiting, *rest):
        moved.append(len(waiting))
        return resolve(waiting, *rest)

    monkeypatch.setattr("klquant.backends.torch.observation.observer.resolve", counted)
    monkeypatch.setattr(counting, "_ON_DEVICE", ("cpu",))
    return moved


def statistics(data=DATA, **options):
    found = quantize(mlp(), data, num_bins=401, **options).calibration
    hists = {name: hist.hist.tolist() for name, hist in found.histograms.items()}
    return found.amax, found.ranges, found.calls, hists, found.zeros, found.beyond


@pytest.mark.parametrize("options", OPTIONS)
def test_a_device_gives_the_statistics_of_the_host(options, monkeypatch):
    expected = statistics(**options)
    monkeypatch.setattr(counting, "_ON_DEVICE", ("cpu",))
    assert statistics(**options) == expected


def test_an_outlier_is_resolved_on_a_device_too(monkeypatch):
    data = [torch.cat([0.001 * DATA[0].repeat(50, 1), torch.full((1, 4), 1e4)])]
    expected = statistics(data)
    monkeypatch.setattr(counting, "_ON_DEVICE", ("cpu",))
    assert statistics(data) == expected


def test_a_batch_has_one_transfer(transfers):
    statistics()
    assert transfers == [2] * 6


def test_layers_that_are_called_in_a_loop_add_up(transfers):
    loop = Net(lambda net, x: sum(net.inner(k * x) for k in range(20)), inner=mlp()).eval()
    assert quantize(loop, DATA, num_bins=401).calibration.calls == {"inner.first": 20, "inner.second": 20}
    assert transfers == [40] * 6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.usefixtures("transfers")
def test_what_is_not_finite_is_named(bad):
    data = [DATA[0], DATA[1].clone()]
    data[1][3, 2] = bad
    with pytest.raises(InvalidInputError, match=r"^layer `first`, batch 1: activations must be finite, got (nan|inf)"):
        statistics(data)


@pytest.mark.usefixtures("transfers")
def test_empty_tensors_and_other_data():
    assert statistics([DATA[0], DATA[0][:0]])[0] == statistics([DATA[0]])[0]

    class Growing:
        factor = 0.5

        def __iter__(self):
            self.factor *= 2
            return iter([self.factor * DATA[0]])

    with pytest.raises(InvalidInputError, match="layer `first`, batch 0: expected the data of pass 1 with amax"):
        statistics(Growing(), keep_bytes=0)
