"""What pass 1 keeps in memory changes nothing but the number of runs: statistics are the same, bit for bit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from klquant.backends.collection import Run, collect_ranges, collect_resolved
from klquant.backends.collection.kept import Kept
from klquant.backends.settings import Settings
from support.arrays import as_data

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from klquant.backends.onnx.calibration import CPU  # noqa: E402
from klquant.backends.onnx.model.preparation import prepare  # noqa: E402
from klquant.backends.onnx.session import open_session  # noqa: E402
from klquant.backends.torch.observation.observer import TorchObserver  # noqa: E402
from support.networks import Net  # noqa: E402
from support.onnx_models import build  # noqa: E402

SETTINGS = Settings(num_bins=255)
WEIGHTS = {name: np.random.default_rng(k).normal(size=(4, 4)).astype(np.float32) for k, name in enumerate("uvw")}
BODY = "a = MatMul(x, u) b = Relu(a) c = MatMul(b, v) d = Identity(x) e = Reshape(d, s) y = MatMul(e, w)"
ONNX = prepare(build("float[n, 4] x", "float c, float y", BODY, s=np.array([-1, 4]), **WEIGHTS))


def in_place(net, x):
    """Run layers on tensors that change after they were observed, and one tensor that several layers take."""
    h = net.a(x)
    y = net.b(h) + net.c(h.relu_())
    h.mul_(3)
    return net.c(h) + net.d(x) + net.b(h.t().contiguous().t()[:, :2].repeat(1, 2)) + y


def torch_model(dtype):
    torch.manual_seed(0)
    return Net(in_place, **{name: torch.nn.Linear(4, 4) for name in "abcd"}).eval().to(dtype)


TORCH = {dtype: TorchObserver(torch_model(dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)}


class OneBuffer:
    """Data that hand out the same memory for all batches of one size, as some readers do."""

    def __init__(self, arrays, convert):
        self.arrays, self.convert, self.times = arrays, convert, 0

    def __iter__(self):
        self.times += 1
        buffers = {}
        for array in self.arrays:
            buffer = buffers.setdefault(len(array), np.empty_like(array))
            buffer[:] = array
            yield self.convert(buffer)


def statistics(model, data, keep_bytes):
    kept = Kept(keep_bytes)
    run = Run(progress=False, kept=kept)
    ranges = collect_ranges(model, data, run=run)
    assert kept.num_bytes <= keep_bytes
    held = kept.num_batches
    counts = collect_resolved(model, data, ranges.amax, SETTINGS, run=run)
    assert kept.num_bytes == 0
    return [as_data(found) for found in (ranges, counts)], held


def assert_same_with_and_without(model, arrays, convert, keep_bytes):
    data = OneBuffer(arrays, convert)
    expected, held = statistics(model, data, 0)
    assert held == 0
    assert statistics(model, data, keep_bytes)[0] == expected
    data = OneBuffer(arrays, convert)
    found, held = statistics(model, data, 2**30)
    assert (found, held) == (expected, len(arrays))


SIZES = st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any)
KEEP_BYTES = st.integers(0, 2000) | st.integers(0, 2**12)


@st.composite
def batches(draw):
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrays = [random.normal(size=(size, 4)).astype(np.float32) for size in draw(SIZES)]
    if draw(st.booleans()):  # an outlier: tensors are counted a third time, when nothing is kept any more
        max(arrays, key=len)[0, 0] = 3e3
    return arrays


@given(arrays=batches(), keep_bytes=KEEP_BYTES, dtype=st.sampled_from(list(TORCH)))
def test_torch(arrays, keep_bytes, dtype):
    def convert(buffer):
        tensor = torch.from_numpy(buffer)
        return tensor if dtype == torch.float32 else tensor.to(dtype)

    assert_same_with_and_without(TORCH[dtype], arrays, convert, keep_bytes)


@given(arrays=batches(), keep_bytes=KEEP_BYTES)
def test_onnx(arrays, keep_bytes):
    with open_session(ONNX, ["x", "a", "b", "c", "e", "y"], CPU) as model:
        assert_same_with_and_without(model, arrays, lambda buffer: {"x": buffer}, keep_bytes)
