"""Mutation testing of the core: ``python tests/tools/mutation/run.py``.

It needs ``pip install mutmut coverage`` and takes an hour or two. ``--file NAME`` takes a module only, and may be
repeated. ``--part 1/2`` takes half of the changes, so that both halves can run at once. ``--out`` names the file for
the JSON lines of results. A run that was stopped continues with the same file. ``--table A.jsonl B.jsonl`` prints the
score and the surviving changes. If a change is in several files, the last one counts.

The tests are collected once. Each change is then made in a fork, which runs the tests that cover the changed lines for
at most --seconds. Tests that killed changes before, and fast ones, come first. A change survives if no test fails in
that time. It counts as killed if it takes many times longer than it should.
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[3]
sys.path[:0] = [str(ROOT / "tests")]
FOLDERS = (ROOT / "klquant", ROOT / "klquant/_search")
CORE = ("affine", "criteria", "divergence", "histogram", "merging", "namespace", "presets", "reference", "threshold",
        "validate", "windows")  # fmt: skip
OTHERS = ("backends/test_html_tables", "project/test_errors", "project/test_public_api")
PROPS = ("affine", "criteria", "divergence", "histogram", "merging", "namespace", "threshold", "validate")
TESTS = [f"tests/core/test_{name}.py" for name in CORE] + [f"tests/{name}.py" for name in OTHERS]
TESTS += [f"property_tests/test_{name}_props.py" for name in PROPS]
MEMORY = 12 << 30
COMPILING = 5.0  # seconds that a test may take longer before JAX has compiled anything


def main():
    options = _options()
    if options.table:
        return _print_table({_key(m): m for file in options.table for m in _read(file)}.values())
    import pytest

    os.environ["KLQUANT_HYPOTHESIS_PROFILE"] = "mutation"
    os.chdir(ROOT)
    unwanted = ("terminal", "cacheprovider", "benchmark", "xdist", "random_order", "cov")
    quiet = ["-o", "addopts=--import-mode=importlib", *(f"-pno:{name}" for name in unwanted)]
    return pytest.main([*quiet, *TESTS], plugins=[Plugin(options)])


def _options():
    parser = argparse.ArgumentParser(description="Mutation testing of the core.")
    parser.add_argument("--file", action="append", help="name of a module, without .py")
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--again", type=Path, help="only those not killed there, say with more --seconds")
    parser.add_argument("--out", type=Path, default=Path("mutation.jsonl").absolute())
    parser.add_argument("--table", type=Path, nargs="+")
    return parser.parse_args()


class Plugin:
    """Replaces pytest's loop over the tests."""

    def __init__(self, options):
        self._options, self._failed, self._killers, self._survivors = options, False, defaultdict(Counter), set()

    def pytest_runtest_logreport(self, report):
        self._failed |= report.failed

    def pytest_runtestloop(self, session):
        from tools.mutation.mutants import mutants

        known, durations = self._known(session.items)
        self._control(session.items, durations)
        part, parts = map(int, self._options.part.split("/"))
        self._options.out.touch()
        chosen = [m for f in self._files() for m in mutants(f) if self._is_wanted(m)]
        random.Random(0).shuffle(chosen)  # noqa: S311 - so that a run that is stopped is a fair sample
        done = {_key(m) for m in _read(self._options.out)}
        with self._options.out.open("a") as out:
            for mutant in chosen[part - 1 :: parts]:
                row = {**mutant._asdict(), "path": mutant.path.name, "source": ""}
                if _key(row) in done:
                    continue
                tests = self._tests(mutant, known, durations)
                seconds = sum(durations[k] for k in tests)
                outcome, killer = self._outcome(mutant, [session.items[k] for k in tests], seconds)
                out.write(json.dumps({**row, "tests": len(tests), "outcome": outcome, "killer": killer}) + "\n")
                out.flush()
        return True

    def _files(self):
        files = [file for folder in FOLDERS for file in sorted(folder.glob("*.py")) if file.stem != "__main__"]
        files.remove(FOLDERS[1] / "__init__.py")
        return [file for file in files if file.stem in (self._options.file or [file.stem])]

    def _is_wanted(self, mutant):
        if self._options.again and not self._survivors:
            self._survivors |= {_key(m) for m in _read(self._options.again) if m["outcome"] != "killed"}
        return not self._options.again or _key({**mutant._asdict(), "path": mutant.path.name}) in self._survivors

    def _control(self, items, durations):
        """Check that a mutant without a change survives."""
        from tools.mutation.mutants import Mutant

        quick = sorted(range(len(items)), key=durations.__getitem__)[: len(items) // 4]
        for file in self._files():
            mutant = Mutant(file, (0, 0), 0, (0, 0), "", "", file.read_text())
            outcome = self._outcome(mutant, [items[k] for k in quick], sum(durations[k] for k in quick))
            if outcome[0] != "survived":
                raise RuntimeError(f"without any change, {file.name} is {outcome}")

    def _known(self, items):
        """Return the result of `_measure`. It is saved next to the results, for the next run of the same tests."""
        kept, names = self._options.out.with_suffix(".tests.json"), [item.nodeid for item in items]
        if not kept.exists() or (found := json.loads(kept.read_text()))["names"] != names:
            found = {"names": names, "measured": in_child(lambda: self._measure(items), limit=3600)[1]}
            kept.write_text(json.dumps(found))
        return found["measured"]

    def _measure(self, items):
        """Run each test once. Return which tests run which lines of which file, and their durations."""
        import coverage

        tracer = coverage.Coverage(data_file=None, config_file=False, include=[f"{folder}/*.py" for folder in FOLDERS])
        durations = []
        tracer.start()
        for k, item in enumerate(items):
            tracer.switch_context(str(k))
            start = time.perf_counter()
            if self._fails(item, items[k + 1] if k + 1 < len(items) else None):
                raise RuntimeError(f"fails without any change: {item.nodeid}")
            waiting = COMPILING if re.search("jax|jit", item.nodeid) else 0.0
            durations.append(time.perf_counter() - start + waiting)
        tracer.stop()
        data = tracer.get_data()
        lines = {Path(file).name: data.contexts_by_lineno(file) for file in data.measured_files()}
        return lines, durations

    def _tests(self, mutant, known, durations):
        """Return the numbers of the tests that run the lines, the most likely to fail first."""
        lines = known.get(mutant.path.name, {})
        numbers = _running(lines, mutant.lines) or _running(lines, mutant.function)  # defaults run before any test
        killers = self._killers[mutant.path.name]
        chosen, seconds = [], 0.0
        for k in sorted(numbers, key=lambda k: (durations[k] - min(killers[k], 5), durations[k])):
            seconds += durations[k]
            if chosen and seconds > self._options.seconds:
                break
            chosen.append(k)
        return chosen

    def _outcome(self, mutant, items, seconds):
        from tools.mutation.mutants import apply

        def attempt():
            try:
                apply(mutant)
            except Exception as error:
                return repr(error)
            return next((k for k, item in enumerate(items) if self._fails(item, None)), None)

        status, number = in_child(attempt, limit=60 + 6 * seconds) if items else (0, None)
        if status == signal.SIGALRM:
            return "timed out", ""
        if status == 0 and number is None:
            return "survived", ""
        if status or isinstance(number, str):
            return "killed", f"ended with {status}: {number}"
        killer = items[number]
        self._killers[mutant.path.name][killer.session.items.index(killer)] += 1
        return "killed", killer.nodeid

    def _fails(self, item, following):
        self._failed = False
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        return self._failed


def in_child(function, limit):
    """Call a function in a fork. Return how it ended (0, a signal or 255), and the result of the function via JSON."""
    begin, end = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(int(limit))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            with os.fdopen(end, "w") as pipe:
                json.dump(function(), pipe)
        except BaseException as error:
            sys.__stderr__.write(f"{error!r:.200}\n")
            os._exit(1)
        os._exit(0)
    os.close(end)
    with os.fdopen(begin) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    signalled = status & 0x7F
    return signalled or (255 if status else 0), json.loads(text) if text and not status else None


def _running(lines, span):
    return {int(k) for n in range(span[0], span[1] + 1) for k in lines.get(str(n), []) if k}


def _read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def _key(mutant):
    return json.dumps([mutant[field] for field in ("path", "lines", "column", "before", "after")])


def _print_table(found):
    for name in [*sorted({m["path"] for m in found}), ""]:
        outcomes = Counter(m["outcome"] for m in found if name in ("", m["path"]))
        killed = outcomes["killed"] + outcomes["timed out"]
        cells = f"{outcomes.total():6} {killed:6} {outcomes['timed out']:6} {outcomes['survived']:6}"
        print(f"{name or 'all':20} {cells}  {killed / outcomes.total():6.1%}")  # noqa: T201
    for m in found:
        if m["outcome"] == "survived":
            print(f"{m['path']}:{m['lines'][0]}  {m['before']:.80}  ->  {m['after']:.80}  [{m['tests']} tests]")  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
