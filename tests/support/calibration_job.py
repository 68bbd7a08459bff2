"""Calibrate an ONNX model by one method, and print the cost in addition to running the model. Run as a script."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script

import json
import statistics
import subprocess
import time
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnxruntime

from klquant import CalibrationWarning
from klquant.backends.onnx import calibrate
from support import resident
from tools.bench.peers import quantize_static


class Job(NamedTuple):
    method: str
    """A criterion of klquant, or a key of peers.quantize_static.METHODS."""
    model: str
    images: str
    """An npy file, shape (images, 1, height, width)."""
    result: str
    """Where to write the result."""
    batch: int = 64
    zoom: int = 1
    """How often each row and column is repeated."""
    number: int | None = None
    """Number of images to use, from the first; None for all."""
    rounds: int = 1
    options: Mapping[str, int] = {}


class Cost(NamedTuple):
    """The cost of a method."""

    running: list[float]
    """CPU seconds of plain runs over the same images, alternating with the calibrations."""
    calibrating: list[float]
    extra_mib: float
    """MiB by which one calibration raised the peak memory of the plain runs."""

    @property
    def ratio(self):
        return statistics.median(self.calibrating) / statistics.median(self.running)


def measure(job):
    """Run the job."""
    command = [sys.executable, __file__, json.dumps(job._asdict())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return Cost(**json.loads(done.stdout))


class Images:
    """Batches of images, each zoomed when it is read."""

    def __init__(self, job):
        self.images, self.batch, self.zoom = np.load(job.images)[: job.number], job.batch, np.ones((job.zoom, job.zoom))

    def __iter__(self):
        for begin in range(0, len(self.images), self.batch):
            yield np.kron(self.images[begin : begin + self.batch], self.zoom).astype(np.float32)


def run(session, name, batches):
    for batch in batches:
        session.run(None, {name: batch})


def calibrate_by(job, name, batches):
    if job.method in quantize_static.METHODS:
        return quantize_static.calibrate(job.method, job.model, name, batches, **job.options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # about hard clipping; the table shows its effect
        return calibrate(job.model, batches, criterion=job.method, **job.options)


def clocked(function, *arguments):
    start = time.process_time()
    return function(*arguments), time.process_time() - start


def main(job):
    session = onnxruntime.InferenceSession(job.model)
    batches, name = Images(job), session.get_inputs()[0].name
    run(session, name, batches)
    before = resident.peak() / 1024
    found, seconds = clocked(calibrate_by, job, name, batches)
    extra, running, calibrating = resident.peak() / 1024 - before, [clocked(run, session, name, batches)[1]], [seconds]
    for _ in range(job.rounds - 1):
        calibrating.append(clocked(calibrate_by, job, name, batches)[1])
        running.append(clocked(run, session, name, batches)[1])
    if job.method in quantize_static.METHODS:
        quantize_static.save(found, job.result)
    else:
        found.save(job.result)
    return Cost(running, calibrating, extra)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Job(**json.loads(sys.argv[1])))._asdict()))
