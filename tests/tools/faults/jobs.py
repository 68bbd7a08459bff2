"""Calibrations to disturb, and the processes that run them."""

import contextlib
import ctypes
import functools
import hashlib
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from klquant.backends import npz
from klquant.backends.torch import Quantizer
from klquant.backends.torch.model.forward import call_model
from support.networks import batch, ready
from support.onnx_models import build

NUM_BATCHES = 10
PHASES = ("starting", "running", "folding", "pass 1", "pass 2", "search", "saving", "over")
CONTEXT = multiprocessing.get_context("forkserver")  # imports once, then forks for each process
CONTEXT.set_forkserver_preload(["klquant.backends.torch", "klquant.backends.onnx", "pytest"])


class State(ctypes.Structure):
    """The state of a process in shared memory, which can be read after its death."""

    _fields_ = (
        ("phase", ctypes.c_int),
        ("writing", ctypes.c_int),
        ("begun", ctypes.c_char * 64),  # digests of the last content: when its write began, and when it ended
        ("written", ctypes.c_char * 64),
    )

    def where(self):
        phase = PHASES[self.phase]
        return f"{phase}, writing" if self.writing else phase


class Seen:
    """A `forward` that remembers the models, and counts the batches that ran in the two passes."""

    def __init__(self, state):
        self.state, self.models, self.runs = state, {}, 0

    def __call__(self, model, item):
        self.models[id(model)] = model
        output = call_model(model, item)
        self.runs += PHASES[self.state.phase] in ("pass 1", "pass 2")
        return output


def start(target, *arguments):
    """Start a function in a process, with a state as its first argument. Return both."""
    state = CONTEXT.RawValue(State)
    process = CONTEXT.Process(target=_quietly, args=(target, state, *arguments))
    process.start()
    return process, state


def _quietly(target, *arguments):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        target(*arguments)


def wait_for(process, state, phase, timeout=60):
    """Wait until a process has reached a phase, or ended."""
    end = time.monotonic() + timeout
    while state.phase < PHASES.index(phase) and process.exitcode is None and time.monotonic() < end:
        time.sleep(0.001)


def network():
    convolutions = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    parts = [*convolutions, nn.Flatten(), nn.Linear(8 * 64, 16), nn.ReLU(), nn.Linear(16, 5)]
    return ready(nn.Sequential(*parts), dtype=torch.float32)


def onnx_model():
    body = "a = Conv(x, w) b = Relu(a) c = Conv(b, v) d = Relu(c) y = GlobalAveragePool(d)"
    return build("float[N,1,12,12] x", "float[N,32,1,1] y", body, w=(32, 1, 3, 3), v=(32, 32, 3, 3))


def batches():
    return [batch(256, 1, 12, 12, seed=k, dtype=torch.float32) for k in range(NUM_BATCHES)]


def calibrate(state, checkpoint, result, *, model=None, data=None, forward=call_model, **options):
    """Calibrate stage by stage, recording the phase in the state; keep the progress after every batch.

    Both passes run the model.
    """

    def enter(phase):
        state.phase = PHASES.index(phase)

    data = batches() if data is None else data
    with _recording_writes(state, checkpoint):
        enter("folding")
        options = {"resume": checkpoint, "checkpoint_seconds": 0.0, "keep_bytes": 0, "forward": forward, **options}
        quantizer = Quantizer(network() if model is None else model, **options)
        quantizer.fold(batches()[0])
        quantizer.quantize_weights()
        enter("pass 1")
        quantizer.collect_amax(data)
        enter("pass 2")
        quantizer.collect_histograms(data)
        enter("search")
        quantizer.search_thresholds()
        enter("saving")
        quantizer.calibration.save(result)
        enter("over")


@contextlib.contextmanager
def _recording_writes(state, checkpoint):
    """Record writes in the state, and slow the disk down so that they can be observed."""
    write, sync = npz.write_atomic, os.fsync

    def write_and_record(path, content):
        state.writing = 1
        if path == checkpoint:
            state.begun = digest(content)
        write(path, content)
        if path == checkpoint:
            state.written = state.begun
        state.writing = 0

    def sync_slowly(handle):
        sync(handle)
        time.sleep(0.004)

    npz.write_atomic, os.fsync = write_and_record, sync_slowly
    try:
        yield
    finally:
        npz.write_atomic, os.fsync, state.writing = write, sync, 0


def digest(content):
    return hashlib.sha256(content).hexdigest().encode()


@functools.cache
def undisturbed():
    """Return the file that an undisturbed calibration writes, and its seconds."""
    with folder_for("undisturbed") as folder:
        process, state = start(calibrate, folder / "progress.npz", folder / "result.npz")
        wait_for(process, state, "folding")
        begin = time.monotonic()
        wait_for(process, state, "over")
        seconds = time.monotonic() - begin
        process.join()
        return (folder / "result.npz").read_bytes(), seconds


@contextlib.contextmanager
def folder_for(what):
    """Yield a folder for one trial."""
    with tempfile.TemporaryDirectory(prefix=f"{what}-") as folder:
        yield Path(folder)
