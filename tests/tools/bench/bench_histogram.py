"""The time to count 10 million float32 values into 8001 bins, compared with merely reading them, on one core.

Run it by
``pytest tests/tools/bench/bench_histogram.py -o python_files='bench_*.py' --benchmark-quiet``. The counts are first
checked: a sample against the reference, and all of them by sorting. Rows and clock are those of ``bench_search.py``.
The yardstick is ``x.min(), x.max()`` and ``(x * factor).astype(int32)`` on the same data.
"""

import importlib.util
import statistics
import time

import numpy as np
import pytest

import klquant
from klquant import reference
from support.namespaces import enable_x64
from tools.bench.peers import machine
from tools.bench.peers.table import Report

SIZE, NUM_BINS, ROUNDS = 10_000_000, 8001, 9
CLOCK = time.process_time
DATA = {
    "Laplace": lambda rng: rng.laplace(size=SIZE),
    "ReLU, half zeros": lambda rng: np.maximum(rng.normal(size=SIZE), 0),
    "one value": lambda _: np.full(SIZE, 0.3),
}

if importlib.util.find_spec("pytest_benchmark"):  # this file is imported without it too, and the mark is unknown then
    pytestmark = pytest.mark.benchmark(timer=CLOCK)
else:
    pytestmark = pytest.mark.skip(reason="needs pytest-benchmark")


@pytest.fixture(scope="module")
def report(request):
    with machine.one_core() as how:
        table = Report(machine.provenance(cores=how), title="histogram")
        request.config.pluginmanager.register(table)
        yield table


@pytest.fixture(scope="module", params=DATA)
def data(request):
    """Return the name and the data, after a check of klquant's counts."""
    x = DATA[request.param](np.random.default_rng(0)).astype(np.float32)
    hist, edges = klquant.histogram(x, num_bins=NUM_BINS)
    np.testing.assert_array_equal(hist, counts_by_sorting(x, float(edges[-1])))
    sample = x[:100_000]
    hist = klquant.histogram(sample, num_bins=NUM_BINS, amax=float(edges[-1])).hist
    np.testing.assert_array_equal(hist, reference.histogram(sample, float(edges[-1]), NUM_BINS))
    return request.param, x


def counts_by_sorting(x, amax):
    """Count |x| >= each inner edge by bisection, on both sides, without computing a bin."""
    factor = NUM_BINS / amax
    odd = np.arange(1, NUM_BINS, 2)
    sides = []
    for side in (-x[x < 0], x[x >= 0]):
        products = np.sort(side.astype(np.float64) * factor)
        sides.append(-np.diff(len(side) - np.searchsorted(products, odd), prepend=len(side), append=0))
    left, right = sides
    return np.concatenate([left[:0:-1], left[:1] + right[:1], right[1:]])


def scan(x):
    return x.min(), x.max()


def multiply_and_cast(x):
    return (x * np.float32(3.7)).astype(np.int32)


def by_turns(*functions):
    """Return the CPU seconds of each function, round by round."""
    rounds = []
    for _ in range(ROUNDS + 1):
        seconds = []
        for function in functions:
            start = CLOCK()
            function()
            seconds.append(CLOCK() - start)
        rounds.append(seconds)
    return [list(column) for column in zip(*rounds[1:], strict=True)]


@pytest.mark.parametrize("amax", ["amax unknown", "amax given"])
def test_numpy(report, benchmark, data, amax):
    name, x = data
    largest = {"amax unknown": None, "amax given": float(np.abs(x).max())}[amax]

    def count():
        return klquant.histogram(x, num_bins=NUM_BINS, amax=largest)

    yardstick, counting = by_turns(lambda: (scan(x), multiply_and_cast(x)), count)
    report.add(f"aminmax and float32 multiply and cast, {name}", yardstick)
    ratio = statistics.median(counting) / statistics.median(yardstick)
    report.add(f"klquant.histogram NumPy, {name}, {amax}", counting, ratio, "x these", ("<=", 2.5))
    benchmark.pedantic(count, rounds=1)


def test_peers(report, benchmark, data):
    name, x = data
    (numpy_s,) = by_turns(lambda: np.histogram(x, bins=NUM_BINS, range=(-1, 1)))
    report.add(f"peer: np.histogram, {name}", numpy_s)
    if not importlib.util.find_spec("jax"):
        report.add(f"klquant.histogram JAX, {name}", note="no JAX here")
        return
    with enable_x64():
        on_jax = importlib.import_module("jax.numpy").asarray(x)
    expected = klquant.histogram(x, num_bins=NUM_BINS).hist

    def count():
        return np.asarray(klquant.histogram(on_jax, num_bins=NUM_BINS).hist)

    np.testing.assert_array_equal(count(), expected)
    (jax_s,) = by_turns(count)
    report.add(f"klquant.histogram JAX on CPU, {name}, amax unknown", jax_s)
    benchmark.pedantic(count, rounds=1)
