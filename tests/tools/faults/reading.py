"""Failures of the input: data that raise in the middle, and progress files that are damaged or from another job."""

import warnings

import numpy as np
from torch.utils.data import DataLoader, Dataset

from klquant import InvalidInputError
from klquant.backends.collection.checkpoint import Checkpoint
from klquant.backends.npz import load_npz, save_npz
from klquant.backends.onnx import calibrate as calibrate_onnx
from support.networks import Broken

from .jobs import NUM_BATCHES, Seen, State, batches, calibrate, folder_for, onnx_model, undisturbed
from .outcomes import Trials

KIND, NAMED = ("checkpoint", 2), "names the batch"


class Failing(Dataset):
    """Batches, one of which cannot be read in the given pass."""

    def __init__(self, bad_pass=0, bad_batch=0):
        self.bad_pass, self.bad_batch, self.passes = bad_pass, bad_batch, 0

    def __len__(self):
        return NUM_BATCHES

    def __getitem__(self, number):
        self.passes += number == 0
        if (self.passes, number) == (self.bad_pass, self.bad_batch):
            raise Broken
        return batches()[number]


def fail_to_read(times, seed):
    """Let data raise a number of times, and damage progress files in every way."""
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [_fail_in_torch(times, rng), _fail_in_onnx(times, rng), _damage(rng)]


def _fail_in_torch(times, rng):
    checked = "the loader's own error, with a note of the batch; no batch is run again; result identical when repaired"
    trials = Trials("a DataLoader raises, torch with resume", checked)
    for bad_pass, bad_batch in _bad(times, rng):
        with folder_for("reading") as folder:
            paths, first, again = (folder / "progress.npz", folder / "result.npz"), Seen(State()), Seen(State())
            options = {"forward": first, "data": _loader(bad_pass, bad_batch), "checkpoint_seconds": 1e9}
            outcome = _outcome(bad_batch, calibrate, first.state, *paths, **options)
            trials.add(f"{outcome}, pass {bad_pass}", (outcome == NAMED, "unexpected"))
            calibrate(again.state, *paths, forward=again, data=_loader())
            trials.expect(first.runs + again.runs == 2 * NUM_BATCHES, "batches are run again")
            trials.expect(paths[1].read_bytes() == undisturbed()[0], "another result")
    return trials.row()


def _fail_in_onnx(times, rng):
    trials = Trials("a DataLoader raises, ONNX", "the loader's own error, with a note of the batch")
    model = onnx_model()
    for bad_pass, bad_batch in _bad(times, rng):
        outcome = _outcome(bad_batch, calibrate_onnx, model, _loader(bad_pass, bad_batch), keep_bytes=0)
        trials.add(f"{outcome}, pass {bad_pass}", (outcome == NAMED, "unexpected"))
    return trials.row()


def _bad(times, rng):
    return zip(rng.integers(1, 3, times).tolist(), rng.integers(NUM_BATCHES, size=times).tolist(), strict=True)


def _loader(bad_pass=0, bad_batch=0):
    return DataLoader(Failing(bad_pass, bad_batch), batch_size=None)


def _outcome(bad_batch, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Broken as error:
        notes = getattr(error, "__notes__", [])
        return NAMED if any(note.startswith(f"batch {bad_batch}:") for note in notes) else f"{notes}"
    return "no error"


def _damage(rng):
    checked = (
        "InvalidInputError that names the file, which stays as it is; or read as it was, if the damage is in padding"
    )
    trials = Trials("a progress file is damaged or foreign", checked)
    with folder_for("damage") as folder:
        path = folder / "progress.npz"
        calibrate(State(), path, folder / "result.npz")
        good, whole = path.read_bytes(), load_npz(path, *KIND)
        for what, content in _damaged(path, good, whole, rng):
            path.write_bytes(content)
            outcome = _read(path, whole)
            trials.add(f"{what}: {outcome}", ("refused" in outcome or "as it was" in outcome, "unexpected"))
            trials.expect(path.read_bytes() == content or "as it was" in outcome, f"{what}: the file was written over")
            trials.expect([*folder.glob(".*")] == [], f"{what}: other files")
    return trials.row()


def _damaged(path, good, whole, rng):
    """Yield the content of a file after each kind of damage, and the name of the damage."""
    meta, arrays = whole
    yield from (("cut off", good[:length]) for length in np.linspace(0, len(good) - 1, 40).astype(int))
    for place in rng.integers(len(good), size=200):
        yield "a byte changed", good[:place] + bytes([good[place] ^ int(rng.integers(1, 256))]) + good[place + 1 :]
    for key in meta.keys() - {"klquant", "schema", "arrays"}:
        yield "a key is missing", _rewritten(path, {k: v for k, v in meta.items() if k != key}, arrays)
    for key in arrays:
        yield "an array is missing", _rewritten(path, meta, {k: v for k, v in arrays.items() if k != key})
        yield "counts of another kind", _rewritten(path, meta, {**arrays, key: arrays[key].astype(np.float32)})
    name, (amax, *rest) = next(iter(meta["passes"].items()))
    for wrong in ({}, [], None, [amax], [{"0": -1.0}, *rest], [{"0": "x"}, *rest], [amax, *rest[:-2], "3", ""]):
        yield "impossible numbers", _rewritten(path, {**meta, "passes": {name: wrong}}, arrays)
    yield "a calibration", (path.parent / "result.npz").read_bytes()
    yield "text", b"no progress at all\n" * 100


def _rewritten(path, meta, arrays):
    save_npz(path, *KIND, {k: v for k, v in meta.items() if k not in ("klquant", "schema")}, arrays)
    return path.read_bytes()


def _read(path, whole):
    identity = whole[0]["identity"]
    try:
        Checkpoint(path, identity)
    except InvalidInputError as error:
        return "refused" if f"`{path}`" in str(error) else f"refused without its name: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    meta, arrays = load_npz(path, *KIND)
    same = meta == whole[0] and {k: v.tobytes() for k, v in arrays.items()} == {
        k: v.tobytes() for k, v in whole[1].items()
    }
    return "read as it was" if same else "read as another"
