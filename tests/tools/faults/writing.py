"""Everything that klquant saves, and a calibration that saves its progress, on full or unwritable disks."""

import errno
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from klquant import KLQuantError
from klquant.backends.formats import FORMATS, write_table
from klquant.backends.onnx import calibrate as calibrate_onnx
from klquant.backends.onnx.model.saving import save_model
from klquant.backends.report import write_report
from klquant.cli import cli

from .disks import DISKS, FULL, full, limited
from .jobs import NUM_BATCHES, Seen, State, batches, calibrate, folder_for, onnx_model, undisturbed
from .outcomes import Trials

OLD = b"what was there before"


class Refused(Exception):
    """The message of a command that ended with exit code 2."""


class Target(NamedTuple):
    save: Callable[[Path], object]
    """Called with the path of the first file."""
    names: tuple[str, ...] = ("file",)
    """Names of all files that are written."""


def save_everywhere(seed, kinds):
    """Save everything on these kinds of disks, and calibrate until one breaks."""
    rng = np.random.default_rng(seed)
    with folder_for("sources") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        all_targets = _targets(folder)
        rows = [_save_all(kind, all_targets) for kind in kinds]
        return [*rows, _fill_the_temporary_folder(rng, kinds), _lose_the_disk(rng, kinds)]


def _save_all(kind, all_targets):
    checked = "error or message names the file; old files whole; no other file; can be saved afterwards"
    trials = Trials(f"saving {len(all_targets)} things, {kind}", checked)
    for what, (save, names) in all_targets.items():
        with DISKS[kind]() as (folder, spoil, mend):
            for path in map(folder.joinpath, names):
                path.write_bytes(OLD)
            spoil()
            outcome = _outcome(folder / names[0], save, folder / names[0])
            mend()
            left = {path.name: path.read_bytes() for path in folder.iterdir()}
            trials.add(outcome, (outcome.endswith("file"), what))
            trials.expect(left == dict.fromkeys(names, OLD), f"{what}: {sorted(left)}")
            save(folder / names[0])
            trials.expect(OLD not in [(folder / name).read_bytes() for name in names], f"{what} is old afterwards")
    return trials.row()


def _outcome(path, function, *arguments, **options):
    """Return the error that is raised, and whether it names the file, or a temporary file written before it."""
    try:
        function(*arguments, **options)
    except (OSError, Refused) as error:
        what = "a command" if isinstance(error, Refused) else errno.errorcode[error.errno]
        names = {"the file": str(path), "a temporary file": str(Path(tempfile.gettempdir(), "klquant-"))}
        named = next((kind for kind, name in names.items() if name in str(error)), f"nothing: {error}")
        return f"{what} names {named}"
    return "no error"


def _targets(folder):
    """Return everything that can be saved, by name. The commands read from this folder."""
    thresholds, model = {f"tensor{k}": 0.1 + k for k in range(500)}, onnx_model()
    sources = [folder / name for name in ("model.onnx", "data.npy", "calibration.npz", "table.json")]
    onnx.save(model, sources[0])
    np.save(sources[1], batches()[0].numpy())
    found = calibrate_onnx(model, [batches()[0].numpy()])
    found.save(sources[2])
    write_table(sources[3], thresholds, format="json")
    return {
        "a calibration": Target(found.save),
        "a report": Target(partial(write_report, found)),
        "a model": Target(lambda path: save_model(model, path)),
        "a model and its weights": Target(lambda path: save_model(model, path, max_bytes=0), ("m", "m.data")),
        **{f"a table for {kind}": _table(thresholds, kind) for kind in FORMATS},
        "klquant calibrate": _command("calibrate", sources[0], "--data", sources[1], "--out"),
        "klquant quantize": _command("quantize", sources[0], sources[2], "--out"),
        "klquant report": _command("report", sources[2], "--out"),
        "klquant convert": _command("convert", sources[3], "--to", "csv"),
    }


def _table(thresholds, kind):
    return Target(lambda path: write_table(path, thresholds, format=kind))


def _command(*arguments):
    def run(path):
        done = CliRunner().invoke(cli, [*map(str, arguments), str(path)])
        if done.exit_code == 2:
            raise Refused(done.stderr)
        if done.exit_code:
            raise AssertionError(done.output) from done.exception

    return Target(run)


def _fill_the_temporary_folder(rng, kinds):
    trials = Trials("ONNX, no room for temporary files", "an error, or the result; nothing temporary is left")
    model, data = onnx_model(), [batches()[0].numpy()]
    expected = calibrate_onnx(model, data).thresholds
    disk = full if FULL in kinds else limited
    for room in rng.integers(0, 120_000, 20).tolist():
        with disk(room) as (folder, spoil, mend), pytest.MonkeyPatch.context() as patch:
            patch.setattr(tempfile, "tempdir", str(folder))
            spoil()
            try:
                fine = calibrate_onnx(model, data).thresholds == expected
                outcome = "the result" if fine else "another result"
            except (OSError, KLQuantError) as error:
                fine, outcome = True, type(error).__name__
            mend()
            trials.add(outcome, (fine, f"{room} bytes"), ([*folder.iterdir()] == [], "something temporary is left"))
    return trials.row()


def _lose_the_disk(rng, kinds):
    checked = "error names the file; all batches before are kept; no other file; result identical afterwards"
    trials = Trials("torch with resume, the disk is spoilt on the way", checked)
    for kind in kinds:
        with DISKS[kind]() as (folder, spoil, mend), folder_for("result") as other:
            paths = folder / "progress.npz", other / "result.npz"
            first, again = Seen(State()), Seen(State())
            spoiling = _spoiling(first, int(rng.integers(1, 2 * NUM_BATCHES)), spoil)
            outcome = _outcome(paths[0], calibrate, first.state, *paths, forward=spoiling)
            mend()
            trials.add(f"{outcome}: {kind}", ("names the file" in outcome, "unexpected"))
            trials.expect([path.name for path in folder.iterdir()] == ["progress.npz"], f"{kind}: other files")
            calibrate(again.state, *paths, forward=again)
            twice = first.runs + again.runs - 2 * NUM_BATCHES
            trials.expect(twice == 1, f"{kind}: {twice} batches were run twice, more than the one that was not written")
            trials.expect(paths[1].read_bytes() == undisturbed()[0], f"{kind}: another result")
    return trials.row()


def _spoiling(seen, last, spoil):
    """Return a `forward` that breaks the disk after a batch of the passes."""

    def forward(model, item):
        output = seen(model, item)
        if seen.runs == last:
            spoil()
        return output

    return forward
