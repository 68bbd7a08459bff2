"""Calibrate an ONNX model by one method, in a process of its own, and say what that costs beside running the model."""

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
    """A criterion of klquant, or one of peers.quantize_static.METHODS."""
    model: str
    images: str
    """An npy file, shape (images, 1, height, width)."""
    result: str
    """Where to write what was found."""
    batch: int = 64
    zoom: int = 1
    """How often each row and column is repeated."""
    number: int | None = None
    """Of images, the first ones; None for all."""
    rounds: int = 1
    options: Mapping[str, int] = {}


class Cost(NamedTuple):
    """What a method costs."""

    running: list[float]
    """Seconds of CPU time for plain runs over the same images, by turns with the next."""
    calibrating: list[float]
    extra_mib: float
    """By which calibrating once raised the peak of memory that running had left."""

    @property
    def ratio(self):
        return statistics.median(self.calibrating) / statistics.median(self.running)


def measure(job):
    """Let the job be done."""
    command = [sys.executable, __file__, json.dumps(job._asdict())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return Cost(**json.loads(done.stdout))


class Images:
    """Batches of images, zoomed only when they are asked for."""

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
        warnings.simplefilter("ignore", CalibrationWarning)  # that it clips hard; the table shows what comes of it
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
