"""Two and three gloo processes, as torchrun starts them, against one process on all the data."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from klquant.backends import onnx as onnx_backend
from klquant.backends.collection import Bins, Observation, Statistics
from klquant.backends.collection.distributed import failing_together, join_all, share
from klquant.backends.torch import Calibration, quantize
from klquant.errors import PeerError
from support.distributed_job import batches, network, onnx_model

pytestmark = pytest.mark.filterwarnings("ignore:layer `[^`]*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")
JOB = Path(__file__).parents[2] / "support" / "distributed_job.py"
UNEVEN = [  # what to do, and how many batches each process gets
    ("two passes", [1, 5]),
    ("two passes", [6, 0]),
    ("one pass", [1, 5]),
    ("resume", [2, 4]),
    ("resume", [2, 4]),
    ("two passes", [2, 0, 4]),
    ("two passes", [0, 5, 1]),
    ("one pass", [0, 2, 4]),
    ("auto", [0, 2, 4]),
    ("ONNX, two passes", [1, 5]),
    ("ONNX, one pass", [0, 2, 4]),
    ("ONNX, resume", [4, 2]),
    ("ONNX, resume", [4, 2]),
]
FAILING = [("a process fails", [3, 3]), ("two passes", [0, 0])]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Run all tasks and return the files that each wrote, by rank: two launches, for they take seconds each."""
    found = {}
    for number in (2, 3):
        folder = tmp_path_factory.mktemp(f"processes{number}")
        tasks = [(what, shares) for what, shares in UNEVEN + FAILING if len(shares) == number]
        torchrun(folder, number, tasks)
        for k, (what, shares) in enumerate(tasks):
            files = [next(folder.glob(f"{k}.{rank}.*")) for rank in range(number)]
            found.setdefault((what, tuple(shares)), []).append(files)
        found[number] = sorted(path.name for path in folder.glob("progress*"))
    return found


def torchrun(folder, number, tasks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}", str(JOB)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder), json.dumps(tasks)],
        check=False,
        timeout=300,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def in_one_process(what):
    options = {"one pass": {"passes": 1}, "auto": {"criterion": "auto"}}.get(what.removeprefix("ONNX, "), {})
    if what.startswith("ONNX"):
        data = [batch.numpy() for batch in batches()]
        return onnx_backend.calibrate(onnx_model(), data, num_bins=801, **options)
    return quantize(network(), batches(), num_bins=801, **options).calibration


@pytest.mark.parametrize(("what", "shares"), UNEVEN)
def test_every_process_ends_with_what_one_process_finds(results, what, shares):
    expected = in_one_process(what)
    for files in results[what, tuple(shares)]:
        for path in files:
            got = Calibration.load(path)
            assert (got.amax, got.calls, got.num_batches) == (expected.amax, expected.calls, expected.num_batches)
            assert (got.ranges, got.zeros, got.beyond) == (expected.ranges, expected.zeros, expected.beyond)
            assert list(got.histograms) == list(expected.histograms)
            for name, (hist, edges) in expected.histograms.items():
                assert got.histograms[name].hist.tolist() == hist.tolist()
                assert got.histograms[name].edges.tolist() == edges.tolist()
            assert got.transforms == expected.transforms
            if what != "auto":  # which looks at the part of the first process that has data
                assert repr(got.thresholds) == repr(expected.thresholds)  # NaN is equal to NaN here


def test_all_processes_take_the_same_criteria(results):
    thresholds = {repr(Calibration.load(path).thresholds) for path in results["auto", (0, 2, 4)][0]}
    assert len(thresholds) == 1


def test_an_error_in_one_process_ends_all_of_them(results):
    first, second = (path.read_text() for path in results["a process fails", (3, 3)][0])
    assert second.startswith("InvalidInputError: layer `0`, batch 2: activations must be finite, got nan")
    assert first == f"PeerError: process 1 of the group failed: {second}"


def test_no_data_at_all_are_an_error_everywhere(results):
    for path in results["two passes", (0, 0)][0]:
        assert path.read_text() == "InvalidInputError: expected at least one calibration batch, got none"


def test_each_process_keeps_its_own_progress(results):
    assert results[2] == ["progress-onnx.rank0", "progress-onnx.rank1", "progress.rank0", "progress.rank1"]
    assert len(results["resume", (2, 4)]) == 2


def test_alone_nothing_is_exchanged():
    statistics = Statistics({"a": Observation(0.0, 1.0, 1, np.ones(3, np.int64), Bins(3, 1.0))}, 1)
    assert join_all(statistics, ["a"], None) is statistics
    assert (share({"a": 1}, None), share(None, None)) == ({"a": 1}, None)
    with pytest.raises(ZeroDivisionError), failing_together(None):
        1 / 0  # noqa: B018


@pytest.mark.parametrize(("own", "error"), [(ZeroDivisionError, ZeroDivisionError), (None, PeerError)])
def test_the_own_error_is_told_also_if_another_process_is_gone(monkeypatch, own, error):
    def share_with_nobody(*_):
        raise PeerError("process 1 of the group: gone")

    def fail():
        with failing_together("a group"):
            if own:
                raise own

    monkeypatch.setattr("klquant.backends.collection.distributed.share", share_with_nobody)
    monkeypatch.setattr("klquant.backends.collection.distributed.rank_of", lambda group: 0)
    with pytest.raises(error):
        fail()


def test_the_network_of_the_job_computes_exactly():
    with torch.no_grad():
        whole = network()(torch.cat(batches()))
        assert torch.equal(whole, torch.cat([network()(batch) for batch in batches()]))


@pytest.mark.parametrize(("rank", "number"), [(0, 1), (1, 0), (None, 1)])
def test_only_the_first_process_warns(rank, number):
    from types import SimpleNamespace

    from klquant.backends.collection.distributed import warning_once
    from klquant.backends.warning import warn

    group = None if rank is None else SimpleNamespace(rank=lambda: rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with warning_once(group):
            warn("layer `fc`: look at it")
    assert len(caught) == number
