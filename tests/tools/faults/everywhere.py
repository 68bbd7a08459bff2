"""Ctrl-C on entry to any Python function, except those that register hooks, and at each line of a save."""

import collections
import itertools
import json
import signal
import sys

import numpy as np

from klquant.backends.npz import save_npz
from support.networks import fingerprint

from .interrupting import all_stages, changed, switches_hooks
from .jobs import Seen, State, folder_for, network, start
from .outcomes import Trials


def interrupt_everywhere(functions, seed, lines=1):
    """Interrupt a calibration in a number of places, and a save at each `lines`-th line."""
    return [
        _row("Ctrl-C, entering a function", "hooks, modes, model as before", _functions, functions, seed),
        _row("Ctrl-C, at each line of a save", "the file is absent or whole; no other file", _lines, lines),
    ]


def _row(fault, checked, task, *arguments):
    trials = Trials(fault, checked)
    with folder_for("everywhere") as folder:
        process, _ = start(_task, folder / "report.json", task, *arguments)
        process.join()
        for outcome, complaints in json.loads((folder / "report.json").read_text()):
            trials.add(outcome, *((False, complaint) for complaint in complaints))
            trials.expect("ignored" not in outcome, "no interrupt came out")
    return trials.row()


def _task(_, report, task, *arguments):
    report.write_text(json.dumps(list(task(*arguments))))


def _functions(times, seed):
    """Interrupt in a number of random places. Yield the outcome of each, and what is wrong after it."""
    rng = np.random.default_rng(seed)
    _calibrate(lambda frame: None)  # so that late imports and caches are done
    calls = collections.Counter()
    _calibrate(lambda frame: calls.update([_place(frame)]))
    places = [place for place in calls if place[2] != __file__ and not switches_hooks(place[0])]
    for index in rng.permutation(len(places))[:times]:
        place = places[index]
        yield _calibrate(_interrupting(place, rng.integers(calls[place])))


def _place(frame):
    """Return the file and the name of a function, and of its caller."""
    back = frame.f_back or frame
    return frame.f_code.co_filename, frame.f_code.co_name, back.f_code.co_filename, back.f_code.co_name


def _interrupting(place, number):
    """Return a function of a frame that raises Ctrl-C at call number `number` of a place."""
    calls = collections.Counter()

    def press(frame):
        if _place(frame) == place:
            calls[place] += 1
            if calls[place] == number + 1:
                signal.raise_signal(signal.SIGINT)

    return press


def _calibrate(on_call):
    """Run all stages, and call a function for each frame. Return the outcome and what is wrong."""
    model, seen = network(), Seen(State())
    before = fingerprint(model)
    outcome = _outcome(lambda frame, *_: on_call(frame), all_stages, model, seen)
    return outcome, changed(model, before, seen)


def _outcome(trace, function, *arguments):
    """Call a function with a trace hook; return where an interrupt that the hook raised went."""
    lost = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda raised: lost.append(raised.exc_type)
    sys.settrace(trace)
    try:
        function(*arguments)
    except KeyboardInterrupt:
        return "comes out"
    finally:
        sys.settrace(None)
        sys.unraisablehook = hook
    return "lost by Python in a deletion" if lost == [KeyboardInterrupt] else "ignored"


def _lines(step):
    """Interrupt a save at each `step`-th line. Yield the outcome of each, and what is wrong after it."""
    whole, _, _ = _save(0)
    for line in itertools.count(1, step):
        left, outcome, lines = _save(line)
        if lines < line:  # the number varies, because names of temporary files are random
            return
        yield f"{'whole' if left else 'absent'}, {outcome}", ["another file"] * (left not in ({}, whole))


def _save(line):
    """Save arrays with an interrupt at a line. Return the files, the outcome, and the number of lines."""
    lines = 0

    def trace(_, event, __):
        nonlocal lines
        lines += event == "line"
        if event == "line" and lines == line:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    with folder_for("save") as folder:
        arrays = {"a": np.arange(5), "b": np.ones(3)}
        outcome = _outcome(trace, save_npz, folder / "a.npz", "test", 1, {}, arrays)
        return {path.name: path.read_bytes() for path in folder.iterdir()}, outcome, lines
