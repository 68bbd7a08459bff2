"""Batches spread over devices, and data spread over processes, give the very statistics of one device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from klquant.backends.jax import calibrate, quantize
from support.jax_job import BATCHES, OPTIONS, described, network, outlier
from support.jax_networks import loops, loops_params

JOB = Path(__file__).parents[2] / "support" / "jax_job.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}


def start(*arguments, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, str(JOB), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**ENVIRONMENT, "XLA_FLAGS": flags}, **pipes)


def results(jobs, files):
    for job in jobs:
        output, _ = job.communicate(timeout=300)
        assert job.returncode == 0, output
    return [json.loads(file.read_text()) for file in files]


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Run one job on four devices, and two processes side by side."""
    folder = tmp_path_factory.mktemp("jobs")
    files = [folder / name for name in ("sharded", "rank0", "rank1")]
    address = free_address()
    jobs = [start("sharded", files[0], devices=4)]
    jobs += [start("processes", file, address, 2, rank) for rank, file in enumerate(files[1:])]
    return dict(zip(("sharded", "rank0", "rank1"), results(jobs, files), strict=True))


@pytest.mark.parametrize("case", ["two passes", "one pass", "explicit", "explicit, no mesh is set"])
def test_statistics_of_sharded_batches(together, case):
    found = together["sharded"][case]
    int8 = quantize(network, loops_params(), BATCHES, passes=1 if case == "one pass" else 2, **OPTIONS)
    expected = described(int8.calibration)
    assert {name: found[name] for name in expected} == json.loads(json.dumps(expected))
    assert found.get("devices", 4) == 4  # the result stays spread
    np.testing.assert_allclose(found["result"], int8.function(loops_params(), BATCHES[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["even", "one has all", "one pass"])
def test_statistics_of_processes(together, case):
    options = {**OPTIONS, "passes": 1 if case == "one pass" else 2}
    expected = described(calibrate(network if case == "one pass" else loops, loops_params(), BATCHES, **options))
    for rank in ("rank0", "rank1"):
        assert together[rank][case] == json.loads(json.dumps(expected))


@pytest.mark.filterwarnings("ignore:layer `dot_general`. expected SQNR:klquant.errors.CalibrationWarning")
def test_all_processes_choose_criteria_together(together):
    function, weight, batches = outlier()
    alone = calibrate(function, weight, batches[:1], num_bins=1001, criterion="auto").thresholds["dot_general"]
    for rank in ("rank0", "rank1"):
        assert together[rank]["auto"]["thresholds"]["dot_general"] > 50 > alone.threshold


def test_a_failure_ends_all_processes(together):
    assert together["rank1"]["failure"].startswith("InvalidInputError: layer `dot_general`, batch 0")
    assert together["rank0"]["failure"].startswith("PeerError: process 1 of the group failed: InvalidInputError")
