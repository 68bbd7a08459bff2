"""Calibrate an ONNX model by one method in a process of its own, beside plain runs; see bench_peers.py.

Time is the CPU time of the process, by turns with runs; memory is how much calibrating once raised the peak that
running had left.
"""

import json
import statistics
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from klquant.backends.onnx.calibrating import calibrate
from peers import quantize_static

from klquant import CalibrationWarning


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


class Images:
    """Batches of images, zoomed only when they are asked for."""

    def __init__(self, job):
        self.images, self.batch, self.zoom = np.load(job.images)[: job.number], job.batch, np.ones((job.zoom, job.zoom))

    def __iter__(self):
        for begin in range(0, len(self.images), self.batch):
            yield np.kron(self.images[begin : begin + self.batch], self.zoom).astype(np.float32)


def run_plainly(job, name, batches):
    session = onnxruntime.InferenceSession(job.model)
    return timed(lambda: [session.run(None, {name: batch}) for batch in batches])[1]


def calibrate_by(job, name, batches):
    if job.method in quantize_static.METHODS:
        return quantize_static.calibrate(job.method, job.model, name, batches, **job.options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # that it clips hard; the table shows what comes of it
        return calibrate(job.model, batches, criterion=job.method, **job.options)


def timed(function):
    start = time.process_time()
    return function(), time.process_time() - start


def peak():
    """Return the peak of memory in KiB; `ru_maxrss` would begin with that of the process which started this one."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0])


def main(job):
    batches, name = Images(job), onnxruntime.InferenceSession(job.model).get_inputs()[0].name
    run_plainly(job, name, batches)
    before = peak()
    found, seconds = timed(lambda: calibrate_by(job, name, batches))
    extra = peak() - before
    running, calibrating = [], [seconds]
    for _ in range(job.rounds):
        running.append(run_plainly(job, name, batches))
        if job.rounds > 1:
            calibrating.append(timed(lambda: calibrate_by(job, name, batches))[1])
    if job.method in quantize_static.METHODS:
        quantize_static.save(found, job.result)
    else:
        found.save(job.result)
    return {"seconds": statistics.median(calibrating), "running": statistics.median(running), "extra_kib": extra}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Job(**json.loads(sys.argv[1])))))
