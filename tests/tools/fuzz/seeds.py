"""Seeds: valid files, which damage turns into nearly valid ones, and bombs."""

import bz2
import io
import json
import warnings
import zipfile

import numpy as np
import onnx
from onnx import numpy_helper, parser

import klquant
from klquant.backends.calibration import Calibration, Fingerprint
from klquant.backends.formats import FORMATS, write_table
from klquant.backends.report.diagnosis import _OF_A_LAYER
from klquant.backends.settings import Settings

HOSTILE = "<b>\x1b[31m[bold]\n</script>'\""
NAMES = ["conv1", HOSTILE, "a/b:c d", "zero"]
THRESHOLDS = dict(zip(NAMES, (0.5, 1.0, 3.25, 1e-3), strict=True))
CACHES = [b"TRT-8601-EntropyCalibration2\nconv1: 3c010a14\n(Unnamed Layer* 0) [x]: 4000890a\nz: 0\n"]
_DIAGNOSIS = {
    "model_sqnr_db": 33.25,
    "model_cosine": None,
    "layers": [{"name": name, "note": HOSTILE, **dict.fromkeys(_OF_A_LAYER, 30.5)} for name in NAMES],
}
DIAGNOSIS = json.dumps(_DIAGNOSIS).encode()


def calibrations(folder):
    """Return calibrations before and after the search, with overrides, and with names of all kinds."""
    rng = np.random.default_rng(0)
    histograms = {name: klquant.histogram(rng.laplace(size=500), num_bins=255) for name in NAMES[:3]}
    amax = {name: float(histogram.edges[-1]) for name, histogram in histograms.items()} | {"zero": 0.0}
    found = Calibration.of(Settings.make(num_bins=255, overrides={"conv*": {"criterion": "mse"}}))._replace(
        model={"conv1": Fingerprint("Conv2d", "0" * 64)},
        amax=amax,
        histograms=histograms,
        calls=dict.fromkeys(amax, 1),
        num_batches=8,
        transforms={"fold": [{"module": "bn", "kind": "relu", "into": None, "reason": ""}], "equalize": []},
        skipped={"head": HOSTILE},
        weight_scales={"conv1": [0.1, 0.0]},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", klquant.CalibrationWarning)
        both = found, found._replace(thresholds=found.search_thresholds(num_bits=6))
    for calibration in both:
        calibration.save(folder / "seed.npz")
        yield _without_times(folder / "seed.npz")


def checkpoints(folder):
    """Return a checkpoint of both passes."""
    from klquant.backends.collection import Bins, Observation, Statistics
    from klquant.backends.collection.checkpoint import Checkpoint, Progress

    tensors = {
        "a": Observation(-0.5, 1.5, 1, np.arange(255), Bins(255, 3.0**-2, -2)),
        HOSTILE: Observation(0.0, 0.0, 2),
    }
    (folder / "seed.npz").unlink(missing_ok=True)
    kept = Checkpoint(folder / "seed.npz", "this model")
    for name in ("amax", "histogram"):
        kept.keep(name, Progress(Statistics(tensors, 3), "0" * 64))
    kept.write()
    yield _without_times(folder / "seed.npz")


def _without_times(path):
    with zipfile.ZipFile(path) as archive:
        return packed(**{name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()})


def tables(folder, *kinds):
    """Return tables of some formats, or of all."""
    for kind in kinds or FORMATS:
        names = ("conv1", "z") if kind == "ncnn" else NAMES if kind in ("json", "csv", "onnxruntime") else ("a b", "z")
        write_table(folder / "seed", dict(zip(names, THRESHOLDS.values(), strict=False)), format=kind)
        yield (folder / "seed").read_bytes()


def packed(method=zipfile.ZIP_DEFLATED, **members):
    """Return a zip file of these bytes, which are given by name without a suffix."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content, compress_type=method)  # without a time
    return buffer.getvalue()


def npy(array=None, *, descr="'<f8'", shape="(3,)", body=b"\0" * 24):
    """Return an npy file of an array, or one that claims to be of this type and shape."""
    if array is not None:
        buffer = io.BytesIO()
        np.save(buffer, array)
        return buffer.getvalue()
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + body


def arrays_of_nothing():
    """Return npy files of many samples with no values."""
    return [
        npy(shape=shape, body=b"") for shape in ("(1000000000000, 0)", "(0,)", "(0, 1000000000000)", "(1000, 0, 7)")
    ]


def bombs():
    """Return npy files that claim to be more than they are."""
    shapes = ("(1000000000000,)", "(4294967296, 4294967296)", "(-1,)", "(1" + "0" * 30 + ",)", "(True,)")
    yield from (npy(shape=shape) for shape in (*shapes, "(" * 3000, "-" * 3000 + "1"))
    yield from (
        npy(descr=descr) for descr in ("'|O'", "'S0'", "'V1000000000'", "[('a', '<f8')]", "{[]: 1}", "'<M8[s]'")
    )
    yield npy(descr="'S0'", shape="(1000000000000000000,)")


def zip_bombs():
    """Return npz files that unpack to too much, in every possible way."""
    zeros = npy(np.zeros(2**20, np.uint8))
    yield from (packed(a=bomb) for bomb in bombs())
    yield packed(zipfile.ZIP_BZIP2, a=zeros)
    yield packed(zipfile.ZIP_LZMA, a=zeros)
    for size in (2**31 - 2, 2**20):
        yield packed(a=zeros).replace(len(zeros).to_bytes(4, "little"), size.to_bytes(4, "little"))
    honest = packed(**{f"a{k}": zeros for k in range(3)})
    yield honest.replace(b"a1.npy", b"a2.npy")
    yield packed(zipfile.ZIP_STORED, a=bz2.compress(zeros))


def arrays():
    """Return npz files of data, and of histograms as `klquant threshold` reads them."""
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    hist, edges = klquant.histogram(x, num_bins=255)
    for content in ({"x": x, "ids": np.arange(5)}, {"arr_0": x}, {"hist": hist, "edges": edges}):
        yield packed(**{name: npy(array) for name, array in content.items()})
    yield packed(counts=npy(hist), amax=npy(np.float64(edges[-1])))


def models(folder):
    """Return ONNX models: folded, old, with branches, functions, Q/DQ, float16, and external weights."""
    weights = {"w": (4, 2, 3, 3), "s": (4,), "b": (4,), "m": (4,), "v": (4,), "p": (4, 5)}
    body = "c = Conv(x, w) n = BatchNormalization(c, s, b, m, v) r = Relu(n) g = GlobalAveragePool(r)"
    yield _model("float[n, 2, 6, 6] x", f"{body} f = Flatten(g) y = MatMul(f, p)", **weights)
    yield _model("float[1, 2, 6, 6] x", f"{body} a = Add(g, g) y = Squeeze<axes = [2, 3]>(a)", opset=9, **weights)
    yield _model("float[n, 2] x", "k = Constant<value = float[2] {1.0, 2.0}>() d = Dropout(x) y = Add(d, k)", opset=11)
    yield _model("float[n, 2] x, bool f", "y = If(f) <then_branch = t () => (float[n, 2] a) { a = Relu(x) }, "
                 "else_branch = e () => (float[n, 2] b) { b = Identity(x) }>")  # fmt: skip
    yield _model("float16[n, 2] x", "c = Cast<to = 1>(x) r = Relu(c) y = Cast<to = 10>(r)", kind="float16")
    yield _model("float[4, 4] x", "q = QuantizeLinear(x, t, z) d = DequantizeLinear(q, t, z) "
                 "j = QuantizeLinear(u, t, z) k = DequantizeLinear(j, t, z) m = MatMul(d, k) "
                 "h = QuantizeLinear(m, t, z) y = DequantizeLinear(h, t, z)",
                 u=(4, 4), t=np.float32(0.1), z=np.int8(0))  # fmt: skip
    yield _model(
        "float[n, 4] x", "r = Tile(k, a) o = ConstantOfShape(a) s = Add(r, o) y = Add(x, s)", k=(1,), a=np.array([4])
    )
    yield functions(2)
    (folder / "weights.bin").write_bytes(bytes(64))
    yield outside("weights.bin")


def model_bombs():
    """Return models that refer to files elsewhere, and models that would grow."""
    yield from (outside(location) for location in ("../../etc/passwd", "/etc/passwd", ".", ""))
    yield functions(40)
    for body in ("r = Tile(k, a) y = Add(x, r)", "r = ConstantOfShape(a) y = Add(x, r)"):
        yield _model("float[m, n] x", body, k=(1,), a=np.array([100_000_000]))


def _model(inputs, body, *, opset=17, kind="float", functions="", **constants):
    text = f'<ir_version: 8, opset_import: ["": {opset}, "mine": 1]> graph ({inputs}) => ({kind}[k, l] y) {{ {body} }}'
    model, rng = parser.parse_model(text + functions), np.random.default_rng(0)
    for name, value in constants.items():
        array = abs(rng.normal(size=value)).astype(np.float32) if isinstance(value, tuple) else value
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model.SerializeToString()


def outside(location):
    model = onnx.ModelProto.FromString(_model("float[n, 4] x", "y = MatMul(x, w)", w=(4, 4)))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "64"}.items():
        tensor.external_data.add(key=key, value=value)
    return model.SerializeToString()


def functions(depth):
    """Return a model of functions, each of which calls the previous one twice."""
    calls = "".join(
        f'<domain: "mine", opset_import: ["": 17, "mine": 1]> f{k} (x) => (y) '
        f"{{ a = mine.f{k - 1}(x) y = mine.f{k - 1}(a) }}"
        for k in range(1, depth)
    )
    first = '<domain: "mine", opset_import: ["": 17]> f0 (x) => (y) { y = Relu(x) }'
    return _model("float[n, 2] x", f"y = mine.f{depth - 1}(x)", functions=first + calls)
