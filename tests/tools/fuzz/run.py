"""Run the fuzzers: ``python tests/tools/fuzz/run.py [--target NAME] [--inputs N] [--seconds S] [--engine atheris]``.

Each target runs in its own process with limited memory. A nightly run takes hours, or less with some --target:

    python tests/tools/fuzz/run.py --inputs 200000 --seconds 3000

It prints a table of results. The exit code is 1 if an input raised anything but a KLQuantError, took too long or too
much memory, or ended the process. The folder --failed keeps these inputs with their tracebacks. With --engine atheris
(pip install atheris) libFuzzer chooses by coverage what to damage next.
"""

import argparse
import importlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
COLUMNS = "{:22} {:>8} {:>8} {:>8} {:>9} {:>9} {:>9}  {}"
HEADER = COLUMNS.format("target", "inputs", "seconds", "errors", "accepted", "worst s", "peak MiB", "")


def main():
    """Run one target after the other."""
    options = _options()
    if options.child:
        return _child(options)
    from tools.fuzz.targets import targets

    print(HEADER, flush=True)  # noqa: T201
    return max(_parent(name, options) for name in options.target or targets())


def _options():
    parser = argparse.ArgumentParser(description="Run the fuzzers.")
    parser.add_argument("--target", action="append", help="one of them; may be repeated")
    parser.add_argument("--inputs", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=600.0, help="for one target")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--engine", choices=["seeded", "atheris"], default="seeded")
    parser.add_argument("--failed", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _parent(name, options):
    """Run a target, with a new process after each crash. Print its row and return the exit code."""
    accounts, failures, deadline = [], Counter(), time.monotonic() + options.seconds
    while (left := options.inputs - sum(account["inputs"] for account in accounts)) > 0:
        seconds = deadline - time.monotonic()
        if seconds <= 0 or len(accounts) == MAX_CRASHES:
            break
        seed = options.seed + ".x" * len(accounts)  # so that the inputs differ from those that led to the crash
        account, ended = _in_child(name, options, ["--inputs", f"{left}", "--seconds", f"{seconds}", "--seed", seed])
        accounts.append(account)
        failures.update(account["failures"])
        failures.update([ended] if ended else [])
    row = {key: reduce(account[key] for account in accounts) for key, reduce in JOINED.items()}
    cells = (f"{row[key]:{form}}" for key, form in ROW.items())
    told = "; ".join(f"{number} x {kind}" for kind, number in failures.items()) or "ok"
    print(COLUMNS.format(name, *cells, told), flush=True)  # noqa: T201
    return 1 if failures else 0


def _in_child(name, options, more):
    """Run a target in a process. Return its account, and how it ended if it did not finish."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=os.environ.get("KLQUANT_FUZZ_TMP")) as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--target", name, "--child", folder, *more]
        ended = subprocess.run(
            command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        written = Path(folder, "account.json")
        account = json.loads(written.read_text()) if written.exists() else {**dict.fromkeys(ROW, 0), "failures": {}}
        if not ended.returncode and account.get("finished"):
            return account, ""
        shutil.copytree(folder, options.failed / f"{name.replace(' ', '-')}-last", dirs_exist_ok=True)
        return account, f"ended with {ended.returncode}: {ended.stderr[-2000:]}"


MAX_CRASHES = 20
ROW = {"inputs": "d", "seconds": ".0f", "errors": "d", "accepted": "d", "worst": ".2f", "peak": ".0f"}
JOINED = {"inputs": sum, "seconds": sum, "errors": sum, "accepted": sum, "worst": max, "peak": max}


def _child(options):
    """Run one target, and write the results regularly, because it may crash."""
    targets, loop, prepare = _imports(options.engine)
    name, folder = options.target[-1], options.child
    logging.disable()
    target = targets()[name]
    (folder / "work").mkdir()
    inputs = loop.damaged(name, target, folder / "work", options.seed)
    attempts = loop.Attempts(name, target, folder / "work", options.failed)
    attempts.attempt(next(inputs))  # the first attempt finishes the imports
    usual = _status("VmSize"), _status("VmHWM")
    limit = (usual[0] + target.mib) << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    deadline = time.monotonic() + options.seconds

    def attempt(data):
        attempts.attempt(data)
        number = attempts.account().inputs
        if number % 100 == 0 or number >= options.inputs or time.monotonic() > deadline:
            finished = number >= options.inputs or time.monotonic() > deadline
            account = {**attempts.account()._asdict(), "peak": _status("VmHWM") - usual[1], "finished": finished}
            (folder / "account.part").write_text(json.dumps(account))
            (folder / "account.part").replace(folder / "account.json")
            return not finished
        return True

    prepare(attempt, inputs, target, folder, options)
    return 0


def _imports(engine):
    """Import the targets, instrumented if an engine needs coverage. Return them and the loop over the inputs."""
    if engine == "seeded":
        return (
            importlib.import_module("tools.fuzz.targets").targets,
            importlib.import_module("tools.fuzz.loop"),
            _seeded,
        )
    import atheris

    with atheris.instrument_imports(include=["klquant", "numpy.lib", "zipfile", "json", "csv"]):
        return (
            importlib.import_module("tools.fuzz.targets").targets,
            importlib.import_module("tools.fuzz.loop"),
            _by_coverage,
        )


def _seeded(attempt, inputs, target, folder, options):
    while attempt(next(inputs)):
        pass


def _by_coverage(attempt, inputs, target, folder, options):
    """Let libFuzzer choose what to damage. It ends the process itself."""
    import random

    import atheris

    (folder / "corpus").mkdir()
    for number, data in enumerate(target.seeds(folder / "work")):
        (folder / "corpus" / str(number)).write_bytes(data)

    def once(data):
        if not attempt(data):
            os._exit(0)

    def damage(data, size, seed):
        return target.mutate(data, random.Random(seed))[:size]  # noqa: S311

    atheris.Setup(["fuzz", "-rss_limit_mb=0", "-max_len=4000000", f"-seed={abs(hash(options.seed)) % 2**31}",
                   str(folder / "corpus")], once, custom_mutator=damage)  # fmt: skip
    atheris.Fuzz()


def _status(key):
    """Return a number of /proc/self/status in MiB."""
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) // 1024


if __name__ == "__main__":
    sys.exit(main())
