"""kill -9 at random moments of a calibration that saves its progress, repeated until it finishes."""

import signal

import numpy as np

from .jobs import calibrate, digest, folder_for, start, undisturbed, wait_for
from .outcomes import Trials


def kill_again_and_again(kills, seed):
    """Kill a number of times in total. Whenever a calibration finishes, start a new one."""
    checked = "after each kill the progress file is the last one written or the next; results identical; no other file"
    trials, rng = Trials("kill -9, torch with resume", checked), np.random.default_rng(seed)
    while trials.outcomes.total() < kills:
        with folder_for("killing") as folder:
            _one_calibration(folder, trials, kills, rng)
    return [trials.row()]


def _one_calibration(folder, trials, kills, rng):
    """Kill a calibration until it finishes, or the number of kills is reached."""
    expected, seconds = undisturbed()
    checkpoint, result, kept = folder / "progress.npz", folder / "result.npz", b""
    while not result.exists():
        process, state = start(calibrate, checkpoint, result)
        wait_for(process, state, "running")
        if trials.outcomes.total() < kills:
            process.join(rng.uniform(0, seconds))
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            found = digest(checkpoint.read_bytes()) if checkpoint.exists() else b""
            whole = found in (state.written or kept, state.begun)
            trials.add(state.where(), (whole, "the progress is neither what was written last nor what came next"))
            kept = found
        elif process.exitcode:
            trials.add("an error", (False, f"exit code {process.exitcode}"))
            return
    left = {path.name for path in folder.iterdir() if not path.match(".result.npz-*.tmp")}
    trials.expect(result.read_bytes() == expected, "the result differs from an undisturbed one")
    trials.expect(left == {"progress.npz", "result.npz"}, f"there are {sorted(left)}")
