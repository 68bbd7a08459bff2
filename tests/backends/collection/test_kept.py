"""What pass 1 keeps: how much, for how long, for which data."""

import numpy as np
import pytest
import torch

from klquant.backends.collection import Kept, Run, collect_counts, collect_ranges
from klquant.backends.onnx import calibrate
from klquant.backends.onnx.session import OnnxObserver
from klquant.backends.settings import Settings
from klquant.backends.torch import Calibration, Quantizer, quantize
from klquant.backends.torch.observation import counting
from klquant.backends.torch.observation.observer import TorchObserver
from klquant.errors import InvalidInputError
from support.networks import Counting, Net
from support.onnx_models import build

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
SETTINGS = Settings(num_bins=255)
BATCH = 16 * 4 * 4  # bytes that a batch of 16 has in each of the layers
DATA = list(torch.randn(5, 16, 4, generator=torch.Generator().manual_seed(0)))


def chain():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4)).eval()


class Data:
    """Batches that count how often they are iterated, each time multiplied by the next factor."""

    def __init__(self, *factors, number=5):
        self.factors, self.times, self.number = factors, 0, number

    def __iter__(self):
        factor = self.factors[self.times]
        self.times += 1
        return (factor * batch for batch in DATA[: self.number])


def passes(data, keep_bytes, *, model=None, second=None):
    """Return the runs of each pass, the batches and bytes that were kept between them, and the Kept itself."""
    runs, kept = Counting(), Kept(keep_bytes)
    observer, run = TorchObserver(model or chain(), forward=runs), Run(progress=False, kept=kept)
    amax = collect_ranges(observer, data, run=run).amax
    first, held = runs.runs, (kept.num_batches, kept.num_bytes)
    collect_counts(observer, data if second is None else second, amax, SETTINGS, run=run)
    return (first, runs.runs - first), held, kept


@pytest.mark.parametrize(
    ("keep_bytes", "held"),
    [(0, 0), (2 * BATCH - 1, 0), (2 * BATCH, 1), (5 * BATCH, 2), (10 * BATCH - 1, 4), (10 * BATCH, 5), (2**30, 5)],
)
def test_whole_batches_are_kept_as_long_as_they_fit(keep_bytes, held):
    assert passes(DATA, keep_bytes)[:2] == ((5, 5 - held), (held, 2 * BATCH * held))


def test_after_the_first_batch_that_does_not_fit_none_is_kept():
    assert passes([DATA[0], DATA[1].repeat(9, 1), DATA[2]], 5 * BATCH)[:2] == ((3, 2), (1, 2 * BATCH))


def test_a_tensor_that_several_layers_take_is_kept_once(monkeypatch):
    def run(net, x):
        return net.a(x) + net.b(net.c(x)) + net.d(x)

    def kept():
        model = Net(run, **{name: torch.nn.Linear(4, 4) for name in "abcd"}).eval()
        return passes(DATA[:1], 2**20, model=model)[1]

    assert kept() == (1, 2 * BATCH)
    monkeypatch.setattr(counting, "_ON_DEVICE", ("cpu",))  # where only calls one after the other are compared
    assert kept() == (1, 3 * BATCH)


def test_each_batch_is_freed_when_it_has_been_counted(monkeypatch):
    left, kept = [], Kept()
    run, observe = Run(progress=False, kept=kept), TorchObserver.observe_kept
    monkeypatch.setattr(
        TorchObserver, "observe_kept", lambda self, *args: left.append(kept.num_batches) or observe(self, *args)
    )
    observer = TorchObserver(chain())
    collect_counts(observer, DATA, collect_ranges(observer, DATA, run=run).amax, SETTINGS, run=run)
    assert left == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_the_model_is_kept(dtype):
    data = [batch.to(dtype) for batch in DATA]
    assert passes(data, 2**20, model=chain().to(dtype))[1] == (5, 5 * BATCH)


def test_data_that_are_all_kept_are_read_once_even_if_they_are_random():
    data = Data(1, 3)
    assert passes(data, 2**20)[:2] == ((5, 0), (5, 10 * BATCH))
    assert data.times == 1


def test_random_data_of_which_a_part_is_kept_are_refused():
    with pytest.raises(InvalidInputError, match="layer `0`, batch 2: expected the data of pass 1 with amax"):
        passes(Data(1, 3), 4 * BATCH)
    with pytest.raises(InvalidInputError, match="expected the 5 batches of pass 1, got 4 in pass 2"):
        quantize_by_stages(Growing(), keep_bytes=4 * BATCH)


class Growing(Data):
    """Data of which the second pass has fewer batches."""

    def __init__(self):
        super().__init__(1, 1)

    def __iter__(self):
        return iter(list(super().__iter__())[: 6 - self.times])


def quantize_by_stages(data, **options):
    quantizer = Quantizer(chain(), num_bins=401, **options)
    quantizer.fold(DATA[0])
    quantizer.quantize_weights()
    quantizer.collect_amax(data)
    quantizer.collect_histograms(data)
    return quantizer


def test_other_data_in_pass_2_are_run():
    assert passes(DATA, 2**20, second=list(DATA))[0] == (5, 5)
    with pytest.raises(InvalidInputError, match="expected the data of pass 1"):
        passes(DATA, 2**20, second=[3 * batch for batch in DATA])


@pytest.mark.parametrize("bad", [1, 4])
def test_an_error_frees_everything(bad):
    kept, data = Kept(), [*DATA[:bad], DATA[bad] * float("nan")]
    with pytest.raises(InvalidInputError, match=f"layer `0`, batch {bad}: activations must be finite"):
        collect_ranges(TorchObserver(chain()), data, run=Run(progress=False, kept=kept))
    assert (kept.num_batches, kept.num_bytes) == (0, 0)


def test_a_stage_that_is_repeated_counts_anew():
    quantizer = quantize_by_stages(DATA)
    before = {name: found.hist.tolist() for name, found in quantizer.calibration.histograms.items()}
    again = quantizer.collect_histograms(DATA)
    assert {name: found.hist.tolist() for name, found in again.items()} == before


@pytest.mark.parametrize(("first", "second"), [(2**20, 0), (0, 2**20), (4 * BATCH, 2**20)])
def test_progress_of_what_was_kept_is_resumed_with_and_without(tmp_path, first, second):
    path = tmp_path / "progress.npz"
    quantize(chain(), DATA[:3], resume=path, keep_bytes=first)
    got = quantize(chain(), DATA, resume=path, keep_bytes=second)
    assert repr(got.thresholds) == repr(quantize(chain(), DATA, keep_bytes=0).thresholds)  # some have NaN
    with pytest.raises(InvalidInputError, match="needs the data in the same order"):
        quantize(chain(), DATA[::-1], resume=path, keep_bytes=second)


@pytest.mark.parametrize("wrong", [-1, 0.5, "1 GiB", None, True])
def test_impossible_numbers_are_refused(wrong):
    for call in (lambda: Kept(wrong), lambda: Quantizer(chain(), keep_bytes=wrong)):
        with pytest.raises(InvalidInputError, match="`keep_bytes` must be 0 or a positive integer, got"):
            call()


def test_a_saved_calibration_is_the_same_file(tmp_path):
    for number in (0, 2**20):
        quantize(chain(), DATA, keep_bytes=number).calibration.save(tmp_path / f"{number}.npz")
    assert (tmp_path / "0.npz").read_bytes() == (tmp_path / f"{2**20}.npz").read_bytes()
    assert Calibration.load(tmp_path / "0.npz").num_batches == 5


@pytest.mark.parametrize(("keep_bytes", "runs"), [(0, 10), (2**20, 5)])
def test_onnx_models_run_once_if_their_tensors_are_kept(monkeypatch, keep_bytes, runs):
    ran, run = [], OnnxObserver._run
    monkeypatch.setattr(OnnxObserver, "_run", lambda self, *args: ran.append(args[-1]) or run(self, *args))
    model = build("float[n, 4] x", "float y", "y = MatMul(x, w)", w=np.eye(4, dtype=np.float32))
    data = [batch.numpy() for batch in DATA]
    found = calibrate(model, data, criterion="max", keep_bytes=keep_bytes)
    assert len(ran) == runs
    assert found.amax["y"] == max(float(abs(batch).max()) for batch in data)
