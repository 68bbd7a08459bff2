"""Ctrl-C at random moments of a PyTorch or ONNX calibration. The process continues and checks what is left."""

import functools
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from klquant.backends.onnx import calibrate as calibrate_onnx
from klquant.backends.torch import collect_amax, collect_histograms, quantize
from support.networks import fingerprint, num_hooks

from .jobs import NUM_BATCHES, PHASES, Seen, State, batches, calibrate, folder_for, network, onnx_model, start, wait_for
from .outcomes import Trials

CHECKED = {
    "torch with resume": "hooks, modes, model as before; no batch counted twice; result identical; no other file",
    "torch, all stages": "hooks, modes, model as before",
    "ONNX": "no file left, also no temporary one; result of the next run identical",
}


class Data:
    """Batches of arrays that record which pass has begun."""

    def __init__(self, state):
        self.state = state

    def __iter__(self):
        self.state.phase = max(self.state.phase + 1, PHASES.index("pass 1"))
        yield from (item.numpy() for item in batches())


def interrupt(times, seed):
    """Interrupt each kind of calibration a number of times."""
    return [_interrupt(kind, times, np.random.default_rng(seed)) for kind in TASKS]


def _interrupt(kind, times, rng):
    trials = Trials(f"Ctrl-C, {kind}", CHECKED[kind])
    seconds, expected = _undisturbed(kind)
    while trials.outcomes.total() < times:
        with folder_for("interrupting") as folder:
            process, state = start(_task, folder, kind)
            wait_for(process, state, "running")
            process.join(rng.uniform(0, seconds))
            where = state.where()
            if process.is_alive():
                os.kill(process.pid, signal.SIGINT)
            process.join(60)
            if process.exitcode or (folder / "report.json").exists():  # otherwise it ended before the interrupt
                trials.add(where, *((False, complaint) for complaint in _complaints(folder, process.exitcode)))
                trials.expect(_result(folder) == expected, f"{where}: another result")
    return trials.row()


@functools.cache
def _undisturbed(kind):
    """Return the seconds of a task without interrupts, and its result."""
    with folder_for("undisturbed") as folder:
        process, state = start(_task, folder, kind)
        wait_for(process, state, "running")
        begin = time.monotonic()
        wait_for(process, state, "over")
        seconds = time.monotonic() - begin
        process.join(60)
        return seconds, _result(folder)


def _result(folder):
    result = folder / "result.npz"
    return result.read_bytes() if result.exists() else b""


def _complaints(folder, exitcode):
    report = folder / "report.json"
    return json.loads(report.read_text()) if report.exists() else [f"exit code {exitcode} after the interruption"]


def _task(state, folder, kind):
    """Run a task in this process, and write what is wrong after its interruption to a file."""
    complaints = TASKS[kind](state, folder)
    if complaints is not None:
        (folder / "report.json").write_text(json.dumps(complaints))


def switches_hooks(file):
    """Return whether a file sets and resets hooks or modes: a Ctrl-C in its functions may leave them set."""
    return Path(file).name in ("contextlib.py", "grad_mode.py", "hooks.py", "overrides.py")


def interrupted(state, function, *arguments, **options):
    """Call a function, and return whether it raised KeyboardInterrupt."""

    def handler(_, frame):
        if switches_hooks(frame.f_code.co_filename):
            signal.setitimer(signal.ITIMER_REAL, 1e-4)  # a little later
        elif PHASES[state.phase] != "over":
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGALRM, handler)
    state.phase = PHASES.index("running")
    try:
        function(*arguments, **options)
    except KeyboardInterrupt:
        return True
    finally:
        state.phase = PHASES.index("over")
    return False


def _torch_with_resume(state, folder):
    model, first, again = network(), Seen(state), Seen(State())
    before, paths = fingerprint(model), (folder / "progress.npz", folder / "result.npz")
    if not interrupted(state, calibrate, state, *paths, model=model, forward=first, checkpoint_seconds=1e9):
        return None
    complaints = changed(model, before, first)
    calibrate(again.state, *paths, model=model, forward=again)
    twice = first.runs + again.runs - 2 * NUM_BATCHES
    fine = {
        f"{twice} batches are counted twice": twice in (0, 1),  # one batch may have run without being counted
        "other files": sorted(folder.iterdir()) == list(paths),
    }
    return complaints + [what for what, is_fine in fine.items() if not is_fine]


def _torch_all_stages(state, folder):
    model, seen = network(), Seen(state)
    before = fingerprint(model)
    return changed(model, before, seen) if interrupted(state, all_stages, model, seen) else None


def all_stages(model, forward):
    quantize(model, batches(), criterion="auto", equalize=True, correct_bias=True, forward=forward)
    amax = collect_amax(model, batches(), forward=forward)
    collect_histograms(model, batches(), amax, forward=forward)


def changed(model, before, seen):
    """Return what has changed."""
    fine = {
        "the model changed": fingerprint(model) == before,
        "hooks are left": not any(map(num_hooks, seen.models.values())),
        "a part is in training mode": not any(m.training for model in seen.models.values() for m in model.modules()),
        "gradients are off": torch.is_grad_enabled(),
        "a mode is left": not _get_current_function_mode_stack() and not _get_current_dispatch_mode_stack(),
    }
    return [what for what, is_fine in fine.items() if not is_fine]


def _onnx(state, folder):
    model, result, temporary = folder / "model.onnx", folder / "result.npz", folder / "temporary"
    onnx.save(onnx_model(), model)
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    if not interrupted(state, _calibrate_onnx, model, state, result):
        return None
    complaints = [f"`{path.name}` is left" for path in [*temporary.iterdir(), *folder.glob(".*")]]
    _calibrate_onnx(model, State(), result)
    return complaints


def _calibrate_onnx(model, state, result):
    calibrate_onnx(model, Data(state)).save(result)


TASKS = {"torch with resume": _torch_with_resume, "torch, all stages": _torch_all_stages, "ONNX": _onnx}
