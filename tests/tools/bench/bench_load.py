"""Time and memory to calibrate, save, load, search and report 500, 1,000 and 2,000 layers in 8001 bins.

Run it by
``pytest tests/tools/bench/bench_load.py -o python_files='bench_*.py'``.
It takes five minutes, on all cores. Each size runs in its own process, which checks that the loaded file gives the same
thresholds as the calibration. Twice the layers should take at most 2.4 times as long, and 2.2 times the memory above
that of the start. ``KLQUANT_BENCH_JSON=path`` writes the table to that file too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.peers import machine
from tools.bench.peers.table import collected

SIZES = (500, 1000, 2000)
JOB = Path(__file__).parents[2] / "support" / "load_job.py"


@pytest.fixture(scope="module")
def report(request):
    provenance = machine.provenance(cores=f"{os.cpu_count()}")
    with collected(
        request.config.pluginmanager, provenance, title="many tensors of 8001 bins", clock="wall ms"
    ) as report:
        yield report


def test_load(report, tmp_path):
    before = None
    for size in SIZES:
        command = [sys.executable, str(JOB), str(size), str(tmp_path)]
        done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        start = done["steps"].pop("nothing")[1]
        figures = {"saved": f"{done['file']:.1f} MiB file", "reported": f"{done['page']:.1f} MiB page"}
        for step, (seconds, peak) in done["steps"].items():
            compared = ()
            if before is not None:
                compared = (seconds / before[step][0], f"x {size // 2}", ("<=", 2.4))
            row = f"{step}, {size} tensors"
            report.add(row, (seconds,), *compared, note=figures.get(step, ""), figures={"MiB": f"{peak - start:.0f}"})
        memory = max(peak for _, peak in done["steps"].values()) - start
        if before is not None:
            growth = memory / before["memory"], f"x {size // 2}", ("<=", 2.2)
            report.add(f"memory, {size} tensors", (), *growth, figures={"MiB": f"{memory:.0f}"})
        before = {**done["steps"], "memory": memory}
