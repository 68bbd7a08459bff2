"""The speed of the threshold search, compared with its peers and its physical bound, on one core.

Run it by
``pytest tests/tools/bench/bench_search.py -o python_files='bench_*.py' --benchmark-quiet``.
It takes about three minutes and prints one table. A wrong result fails. A slow one does not: its row is marked LOSES.
``KLQUANT_BENCH_JSON=path`` writes the table to that file too.

Each curve is first checked against the loops in C, which are checked against the reference. Rows give the median over
warmed-up rounds. The two sides of a ratio alternate, and are measured again for each ratio. The clock is the CPU time
of the process: on one core it is the wall-clock time of an idle machine. Only GPU rows are wall-clock time.
"""

import functools
import importlib.util
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import klquant
from klquant import reference
from support.namespaces import enable_x64
from tools.bench.peers import float32_loops, machine, plain_c
from tools.bench.peers.table import Report

SIZES = (2001, 4001, 8001, 16001)
SIZE = 8001  # the size of the slow peers and of most bars
LEVELS = 255
ROUNDS = 40
MANY = 256
MANY_ON_GPU = (10_000, 2001)
SHAPES = ("ReLU", "heavy-tailed", "1,000 samples", "60 values", "15 values")
CLOCK = time.process_time
COMPILE = """
import os
os.sched_setaffinity(0, range(os.cpu_count()))  # the parent has one core; before JAX counts them
import time, numpy as np, jax, klquant

def clock(function, *arrays):
    wall, cpu = time.perf_counter(), time.process_time()
    jax.jit(function).lower(*arrays).compile()
    print(time.perf_counter() - wall, time.process_time() - cpu)

with jax.enable_x64(True):
    jax.jit(jax.numpy.negative).lower(1.0).compile()
    clock(jax.numpy.linalg.svd, np.ones((512, 300), np.float32))
    edges = np.linspace(-1, 1, {size} + 1)
    clock(klquant.optimal_threshold, np.ones({size}, np.int64), edges)
"""
IMPORT = "import time, numpy; t = time.process_time(); import klquant; print(time.process_time() - t)"

if importlib.util.find_spec("pytest_benchmark"):  # this file is imported without it too, and the mark is unknown then
    pytestmark = pytest.mark.benchmark(timer=CLOCK)
    wall_clock = pytest.mark.benchmark(timer=time.perf_counter)
else:
    wall_clock = pytest.mark.skip(reason="needs pytest-benchmark")


# The table, and the one core


@pytest.fixture(scope="module")
def report(request, one_core):
    table = Report(machine.provenance(cores=one_core), title="threshold search")
    request.config.pluginmanager.register(table)
    yield table
    if "KLQUANT_BENCH_JSON" in os.environ:
        Path(os.environ["KLQUANT_BENCH_JSON"]).write_text(table.as_json() + "\n")


@pytest.fixture(scope="module", autouse=True)
def one_core():
    with machine.one_core() as how:
        yield how


# Histograms, and what is right for them


def _sample(data):
    rng = np.random.default_rng(0)
    samples = {
        "Laplace": lambda: rng.laplace(size=2_000_000),
        "ReLU": lambda: np.maximum(rng.normal(size=1_000_000), 0),
        "heavy-tailed": lambda: rng.standard_t(3, size=500_000),
        "1,000 samples": lambda: rng.normal(size=1_000),
        "60 values": lambda: rng.choice(rng.normal(size=60), size=100_000),
        "15 values": lambda: rng.choice(rng.normal(size=15), size=100_000),
    }
    return samples[data]()


@functools.cache
def histogram_of(data, num_bins):
    """Return the histogram with its centre bin cleared."""
    hist, edges = klquant.histogram(_sample(data), num_bins=num_bins)
    hist[num_bins // 2] = 0
    return hist, edges


@functools.cache
def many_histograms(count, num_bins):
    """Return a number of histograms, each as if from 2 million new samples of the same distribution."""
    hist, edges = histogram_of("Laplace", num_bins)
    return np.random.default_rng(1).poisson(hist, size=(count, num_bins)), edges


@pytest.fixture(scope="module")
def c_curve(tmp_path_factory):
    """Return the loops in C, or None without a compiler."""
    curve = plain_c.compile_curve(tmp_path_factory.mktemp("peers"))
    if curve is not None:
        hist, _ = histogram_of("15 values", SIZES[0])
        assert_same_curve(curve(hist), reference.divergence_curve(hist))
    return curve


@pytest.fixture(scope="module")
def right_curve(c_curve):
    """Return the correct curve, from the loops in C, or slowly from the reference."""
    known = {}

    def curve(hist):
        key = hist.tobytes()
        if key not in known:
            known[key] = (c_curve or reference.divergence_curve)(hist)
        return known[key]

    return curve


def assert_same_curve(curve, right, within=1e-12):
    curve = np.asarray(curve)
    np.testing.assert_array_equal(np.isinf(curve), np.isinf(right))
    np.testing.assert_allclose(curve, right, rtol=0, atol=within)


def assert_same_choice(hist, index, best):
    """Assert that the indices differ only where the reference sees no difference."""
    index, best = int(index), int(best)
    assert index == best or _divergence_at(hist, index) - _divergence_at(hist, best) <= 1e-15


def _divergence_at(hist, index):
    half = LEVELS // 2 + index
    start, stop = len(hist) // 2 - half, len(hist) // 2 + half + 1
    p = reference.reference_distribution(hist, start, stop)
    sliced = hist[start:stop].astype(np.float64)
    sliced[0] = 0
    q = reference.quantized_distribution(sliced, p, LEVELS)
    return reference.kl_divergence(reference.smooth(p), reference.smooth(q))


class Checked(NamedTuple):
    """A checked search without arguments, and the CPU seconds of its first call."""

    search: Callable[[], klquant.Threshold]
    first_seconds: float


@pytest.fixture(scope="module")
def checked(right_curve):
    """Return a function that makes searches, and checks each before it returns it."""

    @functools.cache
    def make(library, data, num_bins):
        hist, edges = histogram_of(data, num_bins)
        search = searching(klquant.optimal_threshold, library, hist, edges)
        threshold, seconds = clocked(search)
        right = right_curve(hist)
        assert_same_curve(searching(klquant.divergence_curve, library, hist, edges)(), right)
        assert_same_choice(hist, threshold.index, np.argmin(right))
        return Checked(search, seconds)

    return make


# Names of rows, and timing


def row_of(library, data, num_bins):
    return f"klquant {library}, {data}, {num_bins}"


class Beside(NamedTuple):
    """A function that alternates with that of a row, so that both see the same noise. Their medians give a ratio."""

    function: Callable[[], object]
    label: str
    wanted: tuple[str, float] | None = None  # the bar for the ratio; None: for information
    inverse: bool = False  # the ratio is this / row instead of row / this
    times: int = 1  # calls per round of the row
    warm: bool = True  # call each once without timing before each turn
    row: str = ""  # the name of its own row, if it has one


def timed(report, benchmark, function, row, *, rounds, warmup_rounds=1, beside=None):
    """Time ``function()``, add the row, return the result."""
    others = []

    def time_other():
        if beside.warm:
            beside.function()
        others.extend(clocked(beside.function)[1] for _ in range(beside.times))
        if beside.warm:
            function()

    setup = time_other if beside else None
    result = benchmark.pedantic(function, setup=setup, rounds=rounds, warmup_rounds=warmup_rounds)
    seconds = tuple(benchmark.stats.stats.data) if benchmark.stats else ()
    if beside and seconds:
        time_other()
        if beside.row:
            report.add(beside.row, others)
        ratio = statistics.median(seconds) / statistics.median(others)
        report.add(row, seconds, 1 / ratio if beside.inverse else ratio, beside.label, beside.wanted)
    else:
        report.add(row, seconds)
    return result


def clocked(function, clock=CLOCK):
    start = clock()
    return function(), clock() - start


def searching(function, library, hist, edges):
    """Return a function without arguments that calls ``function(hist, edges)`` on arrays of this library."""
    if library == "NumPy":
        return functools.partial(function, hist, edges)
    jax = importlib.import_module("jax")
    hist, edges = to_jax(hist, edges)
    with enable_x64():
        program = jax.jit(function).lower(hist, edges).compile()  # without jit, NumPy would do the work
    return lambda: jax.block_until_ready(program(hist, edges))


def to_jax(*arrays, kind="cpu"):
    jax = importlib.import_module("jax")
    with enable_x64():
        return [jax.device_put(array, jax.devices(kind)[0]) for array in arrays]


# Peers


def klquant_beside_peer(checked, num_bins, wanted=None):
    """Return klquant's search to compare with a slow peer. The bar applies at one size only."""
    search = checked("NumPy", "Laplace", num_bins).search
    return Beside(search, "x klquant", wanted if num_bins == SIZE else None, times=20, warm=False)


def test_float32_loops(report, benchmark, checked, right_curve):
    hist, _ = histogram_of("Laplace", SIZES[0])
    assert_same_curve(float32_loops.divergence_curve(hist), right_curve(hist), within=1e-5)
    hist, _ = histogram_of("Laplace", SIZE)
    row, beside = f"peer: copied Python loops (float32), {SIZE}", klquant_beside_peer(checked, SIZE, (">=", 800))
    curve = functools.partial(float32_loops.divergence_curve, hist)
    assert_same_curve(
        timed(report, benchmark, curve, row, rounds=2, beside=beside, warmup_rounds=0), right_curve(hist), within=1e-5
    )


def test_reference(report, benchmark, checked, right_curve):
    """The reference takes half a minute, so it is run and timed once."""
    hist, _ = histogram_of("Laplace", SIZE)
    row, beside = f"peer: klquant.reference (float64), {SIZE}", klquant_beside_peer(checked, SIZE)
    curve = functools.partial(reference.divergence_curve, hist)
    assert_same_curve(timed(report, benchmark, curve, row, rounds=1, beside=beside, warmup_rounds=0), right_curve(hist))


@pytest.mark.parametrize("num_bins", SIZES)
def test_plain_c(report, benchmark, checked, c_curve, num_bins):
    row = f"peer: plain C, -O2 (float64), {num_bins}"
    if c_curve is None:
        report.add(row, note="no C compiler here")
        pytest.skip("no C compiler here")
    hist, _ = histogram_of("Laplace", num_bins)
    beside = klquant_beside_peer(checked, num_bins, (">=", 40))
    timed(report, benchmark, lambda: c_curve(hist), row, rounds=5, beside=beside)


@pytest.mark.parametrize("num_bins", SIZES)
def test_bound(report, benchmark, checked, num_bins):
    numbers = np.random.default_rng(0).uniform(1, 1001, size=num_bins**2 // (2 * LEVELS))
    wanted = ("<=", 3.5) if num_bins == SIZE else None
    beside = Beside(checked("NumPy", "Laplace", num_bins).search, "klquant / bound", wanted, inverse=True)
    row = f"bound: np.log of n^2 / 2L float64, {num_bins}"
    timed(report, benchmark, lambda: np.log(numbers), row, rounds=ROUNDS, beside=beside)


# One histogram

CASES = [*(("Laplace", num_bins) for num_bins in SIZES), *((data, SIZE) for data in SHAPES)]


@pytest.mark.parametrize(("data", "num_bins"), CASES)
def test_numpy(report, benchmark, checked, data, num_bins):
    beside, doubled = None, 2 * num_bins - 1
    if data != "Laplace":
        beside = Beside(checked("NumPy", "Laplace", SIZE).search, "x Laplace", ("<=", 1.5))
    elif doubled in SIZES:
        wanted = ("<", 0.5) if doubled == SIZE else None
        beside = Beside(checked("NumPy", data, doubled).search, f"x {doubled} bins", wanted)
    search = checked("NumPy", data, num_bins).search
    timed(report, benchmark, search, row_of("NumPy", data, num_bins), rounds=ROUNDS, beside=beside)


@pytest.mark.parametrize(("data", "num_bins"), CASES)
def test_jax(report, benchmark, checked, data, num_bins):
    row = row_of("JAX", data, num_bins)
    jax_or_skip(report, row)
    search = checked("JAX", data, num_bins).search
    if data == "Laplace":
        beside = Beside(checked("NumPy", data, num_bins).search, "x NumPy", ("<=", 1.0))
    else:
        beside = Beside(checked("JAX", "Laplace", SIZE).search, "x Laplace", ("<=", 1.5))
    timed(report, benchmark, search, row, rounds=ROUNDS, beside=beside)


def test_compilation(report):
    """Measure fresh processes that may use all cores, because XLA compiles in parallel."""
    jax_or_skip(report, "compilation")
    command = [sys.executable, "-c", COMPILE.format(size=SIZE)]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    svd, svd_cpu, search, search_cpu = (min(map(float, column)) for column in zip(*runs, strict=True))
    how = f"best of 3 (wall, {os.cpu_count()} cores)"
    report.add(f"compilation of jax.numpy.linalg.svd, {how}", (svd,), note=f"CPU {svd_cpu:.2f} s")
    note = f"{search / svd:.1f} x that of svd; CPU {search_cpu:.2f} s"
    report.add(f"compilation of the search, {SIZE}, {how}", (search,), wanted=("<=", 2500), note=note)


def jax_or_skip(report, row):
    if not importlib.util.find_spec("jax"):
        report.add(row, note="no JAX here")
        pytest.skip("no JAX here")
    return importlib.import_module("jax")


# Many histograms


@pytest.mark.parametrize("library", ["NumPy", "JAX"])
def test_one_call(report, benchmark, right_curve, library):
    row = row_of(library, f"{MANY} in one call", SIZE)
    if library == "JAX":
        jax_or_skip(report, row)
    hists, edges = many_histograms(MANY, SIZE)
    search = searching(klquant.optimal_threshold, library, hists, edges)
    batch, seconds = clocked(search)
    assert_same_as_singles(batch, hists, edges, right_curve, every=4)
    singles = row_of(library, f"{MANY} single calls", SIZE)
    beside = Beside(single_calls(library), "x single calls", ("<=", 1.2), warm=False, row=singles)
    timed(report, benchmark, search, row, rounds=3, beside=beside, warmup_rounds=0)
    if library == "JAX":
        report.add(f"{row}: first call, compiles", (seconds,))
    memory = xla_memory(hists, edges) if library == "JAX" else traced_memory(search)
    report.add(f"{row}: peak memory", note=memory)


def single_calls(library):
    hists, edges = many_histograms(MANY, SIZE)
    searches = [searching(klquant.optimal_threshold, library, hist, edges) for hist in hists]
    return lambda: [search() for search in searches]


def assert_same_as_singles(batch, hists, edges, right_curve, every):
    """Compare some rows of the batch with single NumPy calls, and four of these with the correct curves."""
    batch = klquant.Threshold(**{name: np.asarray(field) for name, field in vars(batch).items()})
    for k in range(0, len(hists), every):
        single = klquant.optimal_threshold(hists[k], edges)
        assert_same_choice(hists[k], batch.index[k], single.index)
        assert float(batch.value[k]) == edges[hists.shape[1] // 2 + LEVELS // 2 + 1 + int(batch.index[k])]
        if k % (len(hists) // 4) == 0:
            assert_same_choice(hists[k], batch.index[k], np.argmin(right_curve(hists[k])))


def traced_memory(function):
    """Measure how much Python and NumPy allocate. NumPy reports its arrays to tracemalloc."""
    tracemalloc.start()
    try:
        function()
        return f"{tracemalloc.get_traced_memory()[1] / 2**20:.1f} MiB more (tracemalloc)"
    finally:
        tracemalloc.stop()


def xla_memory(hists, edges):
    """Measure how much the compiled program allocates, as XLA reports it: tracemalloc does not see it."""
    jax = importlib.import_module("jax")
    with enable_x64():
        program = jax.jit(klquant.optimal_threshold).lower(*to_jax(hists, edges)).compile()
    account = program.memory_analysis()
    if account is None:
        return "no account from XLA"
    return f"{(account.temp_size_in_bytes + account.output_size_in_bytes) / 2**20:.1f} MiB more (XLA)"


@wall_clock
def test_gpu(report, benchmark, right_curve):
    row = f"klquant JAX on GPU (wall), {MANY_ON_GPU[0]:,} in one call, {MANY_ON_GPU[1]}"
    kind = gpu_or_skip(report, row)
    hists, edges = many_histograms(*MANY_ON_GPU)
    jax, on_device = importlib.import_module("jax"), to_jax(hists, edges, kind=kind)
    search = functools.partial(klquant.optimal_threshold, *on_device)
    batch, seconds = clocked(lambda: jax.block_until_ready(search()), time.perf_counter)
    report.add(f"{row}: first call, compiles", (seconds,), note=jax.devices(kind)[0].device_kind)
    assert_same_as_singles(batch, hists, edges, right_curve, every=100)
    few = hists[: len(hists) // 100]
    _, on_one_core = clocked(lambda: [klquant.optimal_threshold(hist, edges) for hist in few], time.perf_counter)
    report.add(f"klquant NumPy on one core (wall), {len(few)} single calls, times 100", (100 * on_one_core,))
    seconds = [clocked(lambda: jax.block_until_ready(search()), time.perf_counter)[1] for _ in range(5)]
    ratio = statistics.median(seconds) / (100 * on_one_core)
    report.add(row, seconds, ratio, "x NumPy", ("<=", 1))
    benchmark.pedantic(lambda: None, rounds=1)


def gpu_or_skip(report, row):
    jax = jax_or_skip(report, row)
    try:
        jax.devices("gpu")
    except RuntimeError:
        report.add(row, note="no GPU here")
        pytest.skip("no GPU here")
    return "gpu"


# Import


def test_import(report):
    """Measure the best of several fresh processes, because other load only adds time."""
    command = [sys.executable, "-c", IMPORT]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(9)]
    best = min(float(run.stdout) for run in runs)
    report.add("import klquant after numpy, best of 9", (best,), wanted=("<=", 30))
