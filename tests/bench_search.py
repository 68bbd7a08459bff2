"""How fast the threshold search is, beside its peers and its physical bound, on one core.

Run it by ``pytest tests/bench_search.py -o python_files='bench_*.py' --benchmark-quiet``; it takes about three minutes
and prints one table. It fails where a result is wrong, never where one is slow: such rows stay, marked LOSES.
With ``KLQUANT_BENCH_JSON=path`` the table is also written there.

Each curve is checked against the reference (by way of the loops in C, themselves checked against it) before anything
is timed. Rows give the median over warmed-up rounds; ratios are ratios of medians. The clock is the CPU time of the
process, which on one core is the time it takes where nothing else runs; only import and GPU rows are wall-clock time.
"""

import contextlib
import datetime
import functools
import importlib.util
import json
import operator
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from namespaces import enable_x64
from peers import float32_loops, plain_c

import klquant
from klquant import reference

SIZES = (2001, 4001, 8001, 16001)
SIZE = 8001  # where the slow peers run, and where most of the bars stand
LEVELS = 255
MANY = 256
MANY_ON_GPU = (10_000, 2001)
SHAPES = ("ReLU", "heavy-tailed", "1,000 samples", "60 values", "15 values")
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
CLOCK = time.process_time
RELATIONS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}
IMPORT = "import time, numpy; t = time.perf_counter(); import klquant; print(time.perf_counter() - t)"

if importlib.util.find_spec("pytest_benchmark"):  # without it the mark is unknown, and this file still imported
    pytestmark = pytest.mark.benchmark(timer=CLOCK)
    wall_clock = pytest.mark.benchmark(timer=time.perf_counter)
else:
    wall_clock = pytest.mark.skip(reason="needs pytest-benchmark")


# The table


class Ratio(NamedTuple):
    """One row's median over another's, and how it should come out (None: it is only shown)."""

    over: str
    under: str
    label: str
    wanted: tuple[str, float] | None = None


class Row(NamedTuple):
    name: str
    seconds: tuple[float, ...] = ()
    ratio: Ratio | None = None
    wanted_ms: tuple[str, float] | None = None
    note: str = ""

    @property
    def median_ms(self):
        return statistics.median(self.seconds) * 1e3 if self.seconds else None


class Report:
    """Collects the rows, and as a pytest plugin prints them at the end of the run."""

    def __init__(self):
        self.rows = []
        self.provenance = {}

    def add(self, name, seconds=(), *, ratio=None, wanted_ms=None, note=""):
        self.rows.append(Row(name, tuple(seconds), ratio, wanted_ms, note))

    def lines(self):
        """Return a row's cells by column, for all rows."""
        medians = {row.name: row.median_ms for row in self.rows if row.seconds}
        return [_cells(row, medians) for row in self.rows]

    def as_json(self):
        return json.dumps({"provenance": self.provenance, "rows": self.lines()}, indent=1)

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("threshold search")
        layout = "{row:<48} {median:>10} {ratio:>9} {of:<24} {wanted:>8}  {verdict}"
        heads = {"row": "row", "median": "CPU ms", "ratio": "ratio", "of": "", "wanted": "wanted", "verdict": ""}
        terminalreporter.write_line(layout.format(**heads))
        for line in self.lines():
            cells = {
                "row": line["row"],
                "median": _number(line["median_ms"]),
                "ratio": _number(line["ratio"]),
                "of": line["ratio_of"],
                "wanted": line["wanted"],
                "verdict": ", ".join(text for text in (line["verdict"], line["note"]) if text),
            }
            terminalreporter.write_line(layout.format(**cells).rstrip())
        terminalreporter.write_line("; ".join(f"{key} {value}" for key, value in self.provenance.items()))


def _cells(row, medians):
    ratio, judged, wanted = None, row.median_ms, row.wanted_ms
    if row.ratio is not None and {row.ratio.over, row.ratio.under} <= medians.keys():
        ratio = judged = medians[row.ratio.over] / medians[row.ratio.under]
        wanted = row.ratio.wanted
    verdict = ""
    if wanted is not None and judged is not None:
        verdict = "pass" if RELATIONS[wanted[0]](judged, wanted[1]) else "LOSES"
    return {
        "row": row.name,
        "median_ms": row.median_ms,
        "min_ms": min(row.seconds) * 1e3 if row.seconds else None,
        "rounds": len(row.seconds),
        "ratio": ratio,
        "ratio_of": row.ratio.label if ratio is not None else "",
        "wanted": f"{wanted[0]} {wanted[1]:g}" if wanted is not None else "",
        "verdict": verdict,
        "note": row.note,
    }


def _number(value):
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


@pytest.fixture(scope="module")
def report(request, one_core):
    table = Report()
    table.provenance = _provenance(one_core)
    request.config.pluginmanager.register(table)
    yield table
    if "KLQUANT_BENCH_JSON" in os.environ:
        Path(os.environ["KLQUANT_BENCH_JSON"]).write_text(table.as_json() + "\n")


def _provenance(cores):
    jax = importlib.import_module("jax").__version__ if importlib.util.find_spec("jax") else "none"
    return {
        "Python": platform.python_version(),
        "numpy": np.__version__,
        "jax": jax,
        "klquant": f"{klquant.__version__} from {Path(klquant.__file__).parent}",
        "CPU": _cpu_model(),
        "cores": cores,
        "load": f"{os.getloadavg()[0]:.1f} before the run",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
    }


def _cpu_model():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit():
    git = shutil.which("git")
    if git is None:
        return "unknown"
    command = [git, "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


# One core


@pytest.fixture(scope="module", autouse=True)
def one_core():
    """Keep this process and its children to one core; say how far that went."""
    with pytest.MonkeyPatch.context() as environment, contextlib.ExitStack() as limits:
        for variable in ONE_THREAD:
            environment.setenv(variable, "1")
        blas = "BLAS threads as the environment said when NumPy was imported"
        if importlib.util.find_spec("threadpoolctl"):
            limits.enter_context(importlib.import_module("threadpoolctl").threadpool_limits(1))
            blas = "1 BLAS thread"
        pinned = limits.enter_context(_pinned())
        yield f"{pinned} of {os.cpu_count()}, {blas}"


@contextlib.contextmanager
def _pinned():
    if not hasattr(os, "sched_setaffinity"):
        yield "not pinned: no sched_setaffinity here, all"
        return
    before = os.sched_getaffinity(0)
    _pin({max(before)})
    try:
        yield "pinned to 1"
    finally:
        _pin(before)


def _pin(cores):
    """Pin the threads there are; those to come inherit it, and XLA makes its pool as large as this set."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(task.name), cores)


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
    """Return as many histograms as if each had drawn the same 2 million samples anew."""
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
    """Return the curve that is right, from the loops in C, or slowly from the reference."""
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
    """Let the indices differ only where the reference sees no difference."""
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


def assert_right(hist, curve, threshold, right):
    assert_same_curve(curve, right)
    assert_same_choice(hist, threshold.index, np.argmin(right))


# Names of rows, and timing


def row_of(library, data, num_bins):
    return f"klquant {library}, {data}, {num_bins}"


def timed(report, benchmark, function, row, *, rounds, ratio=None, warmup_rounds=1):
    """Time ``function()``, add the row, return the result."""
    result = benchmark.pedantic(function, rounds=rounds, warmup_rounds=warmup_rounds)
    report.add(row, benchmark.stats.stats.data if benchmark.stats else (), ratio=ratio)
    return result


def against_klquant(row, num_bins, wanted):
    """Return how many times longer than klquant the peer of this row takes; the bar stands at one size."""
    return Ratio(row, row_of("NumPy", "Laplace", num_bins), "x klquant", wanted if num_bins == SIZE else None)


# Peers


def test_float32_loops(report, benchmark, right_curve):
    row = f"peer: copied Python loops (float32), {SIZE}"
    hist, _ = histogram_of("Laplace", SIZE)
    assert_same_curve(float32_loops.divergence_curve(hist), right_curve(hist), within=1e-5)
    ratio = against_klquant(row, SIZE, (">=", 800))
    timed(report, benchmark, lambda: float32_loops.divergence_curve(hist), row, rounds=2, ratio=ratio, warmup_rounds=0)


def test_reference(report, benchmark, right_curve):
    """The yardstick itself takes half a minute: timed the one time that it is run."""
    row = f"peer: klquant.reference (float64), {SIZE}"
    hist, _ = histogram_of("Laplace", SIZE)
    ratio = against_klquant(row, SIZE, None)
    curve = timed(
        report, benchmark, lambda: reference.divergence_curve(hist), row, rounds=1, ratio=ratio, warmup_rounds=0
    )
    assert_same_curve(curve, right_curve(hist))


@pytest.mark.parametrize("num_bins", SIZES)
def test_plain_c(report, benchmark, c_curve, num_bins):
    row = f"peer: plain C, gcc -O2 (float64), {num_bins}"
    if c_curve is None:
        report.add(row, note="no C compiler here")
        pytest.skip("no C compiler here")
    hist, _ = histogram_of("Laplace", num_bins)
    ratio = against_klquant(row, num_bins, (">=", 40))
    timed(report, benchmark, lambda: c_curve(hist), row, rounds=5, ratio=ratio)


@pytest.mark.parametrize("num_bins", SIZES)
def test_bound(report, benchmark, num_bins):
    row = f"bound: n^2 / 2L np.log (float64), {num_bins}"
    numbers = np.random.default_rng(0).uniform(1, 1001, size=num_bins**2 // (2 * LEVELS))
    wanted = ("<=", 3.5) if num_bins == SIZE else None
    ratio = Ratio(row_of("NumPy", "Laplace", num_bins), row, "klquant / bound", wanted)
    timed(report, benchmark, lambda: np.log(numbers), row, rounds=50, ratio=ratio)


# One histogram


def shape_ratio(library, data):
    dense = row_of(library, "Laplace", SIZE)
    return Ratio(row_of(library, data, SIZE), dense, "x Laplace", ("<=", 1.5))


def cases():
    """Return data, number of bins and what each is set against, by library."""
    return [*(("Laplace", num_bins) for num_bins in SIZES), *((data, SIZE) for data in SHAPES)]


@pytest.mark.parametrize(("data", "num_bins"), cases())
def test_numpy(report, benchmark, right_curve, data, num_bins):
    row, ratio = row_of("NumPy", data, num_bins), None
    if data != "Laplace":
        ratio = shape_ratio("NumPy", data)
    elif 2 * num_bins - 1 in SIZES:
        wanted = ("<", 0.5) if num_bins == SIZE // 2 + 1 else None
        ratio = Ratio(row, row_of("NumPy", data, 2 * num_bins - 1), f"x {2 * num_bins - 1} bins", wanted)
    hist, edges = histogram_of(data, num_bins)
    search = functools.partial(klquant.optimal_threshold, hist, edges)
    assert_right(hist, klquant.divergence_curve(hist, edges), search(), right_curve(hist))
    timed(report, benchmark, search, row, rounds=50, ratio=ratio)


@pytest.mark.parametrize(("data", "num_bins"), cases())
def test_jax(report, benchmark, right_curve, data, num_bins):
    row = row_of("JAX", data, num_bins)
    jax = jax_or_skip(report, row)
    hist, edges = histogram_of(data, num_bins)
    on_device = to_jax(hist, edges, device=jax.devices("cpu")[0])
    search = blocked(klquant.optimal_threshold, *on_device)
    threshold, seconds = first_call(search)
    if data == "Laplace":
        report.add(f"{row}: first call, compiles", [seconds])
        ratio = Ratio(row, row_of("NumPy", data, num_bins), "x NumPy", ("<=", 1.0))
    else:
        ratio = shape_ratio("JAX", data)
    assert_right(hist, klquant.divergence_curve(*on_device), threshold, right_curve(hist))
    timed(report, benchmark, search, row, rounds=50, ratio=ratio)


def jax_or_skip(report, row):
    if not importlib.util.find_spec("jax"):
        report.add(row, note="no JAX here")
        pytest.skip("no JAX here")
    return importlib.import_module("jax")


def to_jax(*arrays, device):
    jax = importlib.import_module("jax")
    with enable_x64():
        return [jax.device_put(array, device) for array in arrays]


def blocked(function, *arrays):
    jax = importlib.import_module("jax")
    return lambda: jax.block_until_ready(function(*arrays))


def first_call(function, clock=CLOCK):
    start = clock()
    return function(), clock() - start


# Many histograms


@pytest.mark.parametrize("library", ["NumPy", "JAX"])
def test_single_calls(report, benchmark, library):
    row = row_of(library, f"{MANY} single calls", SIZE)
    hists, edges = batch_for(report, library, row)
    singles = list(hists)
    search_each(singles[:1], edges)
    timed(report, benchmark, lambda: search_each(singles, edges), row, rounds=3, warmup_rounds=0)


@pytest.mark.parametrize("library", ["NumPy", "JAX"])
def test_one_call(report, benchmark, right_curve, library):
    row = row_of(library, f"{MANY} in one call", SIZE)
    hists, edges = batch_for(report, library, row)
    skip_unless_supported(report, row)
    search = blocked(klquant.optimal_threshold, hists, edges) if library == "JAX" else None
    search = search or functools.partial(klquant.optimal_threshold, hists, edges)
    batch, seconds = first_call(search)
    assert_same_as_singles(batch, np.asarray(hists), edges, right_curve, every=4)
    ratio = Ratio(row, row_of(library, f"{MANY} single calls", SIZE), "x single calls", ("<=", 1.2))
    timed(report, benchmark, search, row, rounds=3, ratio=ratio, warmup_rounds=0)
    if library == "JAX":
        report.add(f"{row}: first call, compiles", [seconds])
    memory = xla_memory(hists, edges) if library == "JAX" else traced_memory(search)
    report.add(f"{row}: peak memory", note=memory)


def batch_for(report, library, row):
    hists, edges = many_histograms(MANY, SIZE)
    if library == "NumPy":
        return hists, edges
    jax = jax_or_skip(report, row)
    return to_jax(hists, edges, device=jax.devices("cpu")[0])


def skip_unless_supported(report, row):
    hist, edges = histogram_of("Laplace", SIZES[0])
    try:
        klquant.optimal_threshold(np.stack([hist, hist]), edges)
    except klquant.InvalidInputError:
        report.add(row, note="not supported")
        pytest.skip("optimal_threshold takes one histogram at a time")


def search_each(hists, edges):
    return [klquant.optimal_threshold(hist, edges) for hist in hists]


def assert_same_as_singles(batch, hists, edges, right_curve, every):
    """Compare some of the batch with single NumPy calls, and four of those with what is right."""
    edges = np.asarray(edges)
    for k in range(0, len(hists), every):
        single = klquant.optimal_threshold(hists[k], edges)
        assert_same_choice(hists[k], batch.index[k], single.index)
        assert float(batch.value[k]) == edges[hists.shape[1] // 2 + LEVELS // 2 + 1 + int(batch.index[k])]
        if k % (len(hists) // 4) == 0:
            assert_same_choice(hists[k], batch.index[k], np.argmin(right_curve(hists[k])))


def traced_memory(function):
    """Say how much Python and NumPy allocate on top of what there was; NumPy reports its arrays to tracemalloc."""
    tracemalloc.start()
    try:
        function()
        return f"{tracemalloc.get_traced_memory()[1] / 2**20:.1f} MiB more (tracemalloc)"
    finally:
        tracemalloc.stop()


def xla_memory(hists, edges):
    """Say how much the compiled program allocates: XLA's account of it, as tracemalloc does not see it."""
    jax = importlib.import_module("jax")
    with enable_x64():
        program = jax.jit(klquant.optimal_threshold).lower(hists, edges).compile()
    account = program.memory_analysis()
    if account is None:
        return "no account from XLA"
    return f"{(account.temp_size_in_bytes + account.output_size_in_bytes) / 2**20:.1f} MiB more (XLA)"


@wall_clock
def test_gpu(report, benchmark, right_curve):
    row = f"klquant JAX on GPU (wall), {MANY_ON_GPU[0]:,} in one call, {MANY_ON_GPU[1]}"
    device = gpu_or_skip(report, row)
    skip_unless_supported(report, row)
    hists, edges = many_histograms(*MANY_ON_GPU)
    on_device = to_jax(hists, edges, device=device)
    search = blocked(klquant.optimal_threshold, *on_device)
    batch, seconds = first_call(search, time.perf_counter)
    host = klquant.Threshold(*(np.asarray(field) for field in batch))
    assert_same_as_singles(host, hists, edges, right_curve, every=100)
    timed(report, benchmark, search, row, rounds=5)
    report.add(f"{row}: first call, compiles", [seconds])


def gpu_or_skip(report, row):
    jax = jax_or_skip(report, row)
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        report.add(row, note="no GPU here")
        pytest.skip("no GPU here")


# Import


def test_import(report):
    """The best of several fresh processes: what else the machine does only adds."""
    command = [sys.executable, "-c", IMPORT]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(9)]
    report.add(
        "import klquant after numpy (wall, best of 9)", [min(float(run.stdout) for run in runs)], wanted_ms=("<=", 30)
    )
