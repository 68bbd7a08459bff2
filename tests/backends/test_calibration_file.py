"""A calibration is data: it is saved, read back, searched again, and never used for another model."""

import io
import json
import math
import zipfile

import numpy as np
import pytest

import klquant
from klquant.backends.calibration import Calibration, Fingerprint
from klquant.backends.npz import load_npz, save_npz
from klquant.backends.settings import MAX_BINS, Settings
from klquant.backends.thresholds import LayerThreshold, search_thresholds
from klquant.errors import InvalidInputError

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
ODD_NAMES = ["", "a.b/c:d e", "hist_0", "größe\n"]


@pytest.fixture
def calibration():
    rng = np.random.default_rng(0)
    data = {name: rng.laplace(size=5000) * 10.0**k for k, name in enumerate(ODD_NAMES)}
    histograms = {name: klquant.histogram(x, num_bins=801) for name, x in data.items()}
    amax = {name: float(abs(x).max()) for name, x in data.items()} | {"zero": 0.0}
    settings = Settings.make(num_bins=801, exclude="head*", overrides={"hist_*": {"criterion": "max"}})
    model = {name: Fingerprint(f"Linear(weight (3, {k}))", f"{k:064x}") for k, name in enumerate([*amax, "head"])}
    transforms = {"fold": [{"module": "bn", "kind": "batch_norm", "into": None, "reason": "why"}], "equalize": []}
    calls = dict.fromkeys(amax, 2)
    scales = {"a.b/c:d e": [0.1, 0.0, 1 / 3], "head": [2.0]}
    return Calibration(settings, model, amax, histograms, {}, calls, 7, transforms, {"head": "excluded"}, scales)


def same(a, b):
    histograms = {name: (h.hist.tolist(), h.edges.tolist()) for name, h in a.histograms.items()}
    assert histograms == {name: (h.hist.tolist(), h.edges.tolist()) for name, h in b.histograms.items()}
    assert all(h.hist.dtype == np.int64 for h in b.histograms.values())
    assert repr(a.thresholds) == repr(b.thresholds)  # NaN is equal to NaN here
    empty = {"histograms": {}, "thresholds": {}, "versions": {}}
    assert a._replace(**empty) == b._replace(**empty)


def test_all_of_it_is_read_back(calibration, tmp_path):
    calibration.save(tmp_path / "one.npz")
    read = Calibration.load(tmp_path / "one.npz")
    same(calibration, read)
    assert read.versions == {"klquant": klquant.__version__, "numpy": np.__version__}
    with pytest.warns(klquant.CalibrationWarning, match="layer `zero`: all its values are 0"):
        searched = calibration._replace(thresholds=calibration.search_thresholds())
    assert math.isinf(searched.thresholds["zero"].sqnr_db)
    searched.save(str(tmp_path / "new folder" / "two.npz"))
    same(searched, Calibration.load(str(tmp_path / "new folder" / "two.npz")))


@pytest.mark.filterwarnings("ignore:layer `zero`")
@pytest.mark.parametrize("criterion", ["entropy", "mse", "percentile", "max"])
@pytest.mark.parametrize("num_bits", [None, 4, 9])
def test_another_criterion_or_number_of_bits_is_chosen_from_the_file(calibration, tmp_path, criterion, num_bits):
    calibration.save(tmp_path / "c.npz")
    found = Calibration.load(tmp_path / "c.npz").search_thresholds(criterion=criterion, num_bits=num_bits, guard=False)
    for name, histogram in calibration.histograms.items():
        plain = search_thresholds({name: calibration.amax[name]}, {name: histogram}, criterion=criterion, guard=False)[
            name
        ]
        assert found[name].num_bits == (num_bits or 8)
        assert found[name].criterion == ("max" if name == "hist_0" else criterion)
        if num_bits is None and name != "hist_0":
            assert repr(found[name]) == repr(plain)
        assert found[name].scale == found[name].threshold / (2 ** ((num_bits or 8) - 1) - 1)


def test_a_file_from_before_scales_of_weights_were_kept_is_read(calibration, tmp_path):
    calibration.save(tmp_path / "new.npz")
    meta, arrays = load_npz(tmp_path / "new.npz", "calibration", 1)
    old = {name: array for name, array in arrays.items() if not name.startswith("weights_")}
    save_npz(tmp_path / "old.npz", "calibration", 1, {k: v for k, v in meta.items() if k != "weights"}, old)
    same(calibration._replace(weight_scales={}), Calibration.load(tmp_path / "old.npz"))


def test_a_failed_write_leaves_the_old_file(calibration, tmp_path, monkeypatch):
    path = tmp_path / "c.npz"
    calibration.save(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        calibration._replace(num_batches=8).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["c.npz"]


def test_a_calibration_of_another_model_names_the_layers(calibration):
    calibration.check_fits(dict(reversed(calibration.model.items())))
    other = dict(calibration.model)
    other["hist_0"] = other["hist_0"]._replace(kind="Conv2d(weight (1, 2))")
    other["zero"] = other["zero"]._replace(digest="0")
    del other["head"]
    other["new"] = Fingerprint("Linear", "1")
    with pytest.raises(InvalidInputError) as caught:
        calibration.check_fits(other)
    for part in (
        "4 differing layers",
        "`head` is only in the calibration",
        "`new` is only in the model",
        "`hist_0` is Conv2d(weight (1, 2)), was calibrated as Linear(weight (3, 2))",
        "`zero` has other weights",
    ):
        assert part in str(caught.value)


def test_many_differences_are_not_all_listed(calibration):
    many = calibration._replace(model={f"layer{k}": Fingerprint("Linear", "") for k in range(50)})
    with pytest.raises(InvalidInputError, match=r"50 differing layers: .*; \.\.\.$") as caught:
        many.check_fits({})
    assert str(caught.value).count("only in the calibration") == 10


def rewritten(path, *, kind="calibration", schema=1, **changes):
    """Change what a file says it is, or entries of it; None drops one."""
    meta, arrays = load_npz(path, "calibration", 1)
    meta = {k: v for k, v in meta.items() if k not in ("klquant", "schema")}
    for key, value in changes.items():
        target = meta if key in meta else arrays
        if value is None:
            del target[key]
        else:
            target[key] = value
    save_npz(path, kind, schema, meta, arrays)


def chosen(path, *, amax=1.0, threshold=0.5, criterion="max", num_bits=8):
    """Give a file one threshold."""
    row = [[amax, threshold, np.nan, 0.0, 30.0]]
    rewritten(path, thresholds=np.array(row), chosen={"a.b/c:d e": (criterion, num_bits)})


def guarded(path, replaced, gains):
    """Record a guard for a file with one threshold."""
    chosen(path)
    rewritten(path, replaced=replaced, gain_db=np.array(gains, np.float64))


def plain_array():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


DAMAGE = {
    "no bytes": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("layer: 3c010a14\n"),
    "half a file": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "another npz": lambda path: np.savez(path, a=np.zeros(3)),
    "a pickle": lambda path: np.savez(path, meta=np.array([{"a": 1}], dtype=object)),
    "a plain array": lambda path: path.write_bytes(plain_array()),
    "no JSON": lambda path: np.savez(path, meta=np.frombuffer(b"{", np.uint8)),
    "JSON of another shape": lambda path: np.savez(path, meta=np.frombuffer(b"[1]", np.uint8)),
    "another kind": lambda path: rewritten(path, kind="checkpoint"),
    "a newer schema": lambda path: rewritten(path, schema=2),
    "no amax": lambda path: rewritten(path, amax=None),
    "other layers": lambda path: rewritten(path, layers=["a"]),
    "float counts": lambda path: rewritten(path, hist_0=np.ones(801)),
    "negative counts": lambda path: rewritten(path, hist_0=np.full(801, -1)),
    "a negative count": lambda path: rewritten(path, hist_0=np.arange(-1, 800)),
    "counts of two dimensions": lambda path: rewritten(path, hist_0=np.ones((801, 2), np.int64)),
    "one bin": lambda path: rewritten(path, hist_0=np.ones(1, np.int64)),
    "no bins": lambda path: rewritten(path, hist_0=np.ones(0, np.int64)),
    "an even number of bins": lambda path: rewritten(path, hist_0=np.ones(800, np.int64)),
    "a range of NaN": lambda path: rewritten(path, range=np.full(5, np.nan)),
    "ranges upside down": lambda path: rewritten(path, low_high=np.array([[1.0, 0.0]] * 5)),
    "ranges from -infinity": lambda path: rewritten(path, low_high=np.array([[-np.inf, 0.0]] * 5)),
    "ranges to infinity": lambda path: rewritten(path, low_high=np.array([[0.0, np.inf]] * 5)),
    "ranges of fewer tensors": lambda path: rewritten(path, low_high=np.zeros((4, 2))),
    "unknown settings": lambda path: rewritten(path, settings={"bins": 3}),
    "thresholds without tensors": lambda path: rewritten(path, thresholds=np.ones((1, 5))),
    "calls as text": lambda path: rewritten(path, calls={"a": "often"}),
    "calls without end": lambda path: rewritten(path, calls={"a": 10**30}),
    "a negative number of batches": lambda path: rewritten(path, num_batches=-1),
    "half a batch": lambda path: rewritten(path, num_batches=0.5),
    "a layer twice": lambda path: rewritten(path, layers=["a", "a", "b", "c", "d"]),
    "a name that is no text": lambda path: rewritten(path, layers=[1, "a", "b", "c", "d"]),
    "a name that is no Unicode": lambda path: rewritten(path, layers=["\ud800", "a", "b", "c", "d"]),
    "a reason that is no Unicode": lambda path: rewritten(path, skipped={"a": "\udfff"}),
    "a stage that is no Unicode": lambda path: rewritten(path, transforms={"\ud800": []}),
    "a column that is no Unicode": lambda path: rewritten(path, transforms={"fold": [{"\udfff": 1}]}),
    "an amax of another type": lambda path: rewritten(path, amax=np.ones(5, np.int64)),
    "an endless amax": lambda path: rewritten(path, amax=np.full(5, np.inf)),
    "a negative amax": lambda path: rewritten(path, amax=np.full(5, -1.0)),
    "an amax of two dimensions": lambda path: rewritten(path, amax=np.ones((5, 1))),
    "a range that overflows": lambda path: rewritten(path, range=np.full(5, np.inf)),
    "counts of nothing": lambda path: rewritten(path, hist_0=np.zeros(801, np.int64)),
    "counts of 2**64": lambda path: rewritten(path, hist_0=np.full(801, 2**55)),
    "counts whose sum overflows to a positive number": lambda path: rewritten(path, hist_0=np.full(5, 2**62)),
    "too many bins": lambda path: rewritten(path, hist_0=np.ones(3 * MAX_BINS + 2, np.int64)),
    "patterns that are no text": lambda path: rewritten(path, settings={"include": [1]}),
    "rows that are no rows": lambda path: rewritten(path, transforms={"fold": [5]}),
    "rows of many columns": lambda path: rewritten(path, transforms={"fold": [{str(k): ""} for k in range(17)]}),
    "rows within rows": lambda path: rewritten(path, transforms={"fold": [{"a": {"b": {}}}]}),
    "scales that are none": lambda path: rewritten(path, weights_0=np.full(3, np.nan)),
    "scales of two dimensions": lambda path: rewritten(path, weights_0=np.ones((3, 3))),
    "T of NaN": lambda path: chosen(path, threshold=np.nan),
    "T of 0": lambda path: chosen(path, threshold=0.0),
    "a negative amax of T": lambda path: chosen(path, amax=-1.0),
    "T by an unknown criterion": lambda path: chosen(path, criterion="kl"),
    "T for too many bits": lambda path: chosen(path, num_bits=10**9),
    "T for no bits": lambda path: chosen(path, num_bits=1),
    "a guard of an unknown tensor": lambda path: guarded(path, {"other": "entropy"}, [1.0]),
    "a guard of an unknown criterion": lambda path: guarded(path, {"a.b/c:d e": "kl"}, [1.0]),
    "a guard with too few gains": lambda path: guarded(path, {"a.b/c:d e": "entropy"}, []),
    "a guard with a gain of NaN": lambda path: guarded(path, {"a.b/c:d e": "entropy"}, [np.nan]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_or_foreign_file_is_a_named_error(calibration, tmp_path, damage):
    path = tmp_path / "c.npz"
    calibration.save(path)
    DAMAGE[damage](path)
    with pytest.raises(InvalidInputError, match=r"c\.npz` must be a klquant calibration file"):
        Calibration.load(path)


def test_a_threshold_is_read_back(calibration, tmp_path):
    calibration.save(tmp_path / "c.npz")
    chosen(tmp_path / "c.npz")
    (found,) = Calibration.load(tmp_path / "c.npz").thresholds.values()
    assert repr(found) == repr(LayerThreshold(1.0, 0.5, math.nan, 0.0, 30.0, "max", 8))


def test_what_the_guard_changed_is_read_back_and_older_files_have_none_of_it(calibration, tmp_path):
    calibration.save(tmp_path / "c.npz")
    guarded(tmp_path / "c.npz", {"a.b/c:d e": "entropy"}, [np.inf])
    (found,) = Calibration.load(tmp_path / "c.npz").thresholds.values()
    assert repr(found) == repr(LayerThreshold(1.0, 0.5, math.nan, 0.0, 30.0, "max", 8, "entropy", math.inf))
    old = calibration.settings.as_json()
    assert old.pop("guard") is True
    rewritten(tmp_path / "c.npz", settings=old)
    assert Calibration.load(tmp_path / "c.npz").settings == calibration.settings
    rewritten(tmp_path / "c.npz", settings={"guard": "no"})
    with pytest.raises(InvalidInputError, match="`guard` must be True or False, got 'no'"):
        Calibration.load(tmp_path / "c.npz")


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Calibration.load(tmp_path / "none.npz")


def test_the_file_says_what_it_is_and_holds_no_pickle(calibration, tmp_path):
    calibration.save(tmp_path / "c.npz")
    with zipfile.ZipFile(tmp_path / "c.npz") as archive:
        assert all(b"|O" not in archive.read(name)[:128] for name in archive.namelist())
    with np.load(tmp_path / "c.npz", allow_pickle=False) as content:
        meta = json.loads(content["meta"].tobytes())
    assert (meta["klquant"], meta["schema"], meta["versions"]["klquant"]) == ("calibration", 1, klquant.__version__)
