"""Compare the search with plain loops on many random histograms.

``python tests/tools/bench/exactness.py 2000 --jobs 2``

This takes minutes, so it is not part of the tests. It prints a summary by shape and all differences, and exits with 1
if there are any.
"""

import argparse
import functools
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import klquant
from klquant import reference

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.bench.peers import exact
from tools.bench.peers.plain_c import compile_curve

WITHIN = 1e-12  # largest error of a curve
TIED = 1e-15  # either of two divergences as close as this may be chosen
SIZES = [255, 257, 511, 801, 1001, 2001, 2047, 4001, 8001, 16001]
LEVELS = [3, 15, 63, 127, 255, 511]


def _distance(n):
    return np.abs(np.arange(n) - n // 2) + 1.0


SHAPES = {
    "dense": lambda rng, n: rng.integers(1, 1000, n),
    "sparse": lambda rng, n: (rng.random(n) < rng.choice([0.002, 0.02, 0.2])) * rng.integers(1, 50, n),
    "spike": lambda rng, n: rng.poisson(3, n) + (np.arange(n) == rng.integers(n)) * 2 ** rng.integers(10, 61),
    "comb": lambda rng, n: (np.arange(n) % rng.integers(2, 40) == 0) * rng.integers(0, 90, n),
    "discrete": lambda rng, n: np.bincount(rng.choice(rng.integers(0, n, 40), 100_000), minlength=n),
    "one-sided": lambda rng, n: (np.arange(n) > n // 2) * rng.poisson(1e4 * np.exp(-_distance(n) / n * 20)),
    "heavy-tailed": lambda rng, n: rng.poisson(1e6 * _distance(n) ** -rng.uniform(1, 3)),
    "hollow": lambda rng, n: (_distance(n) > n * rng.uniform(0.05, 0.45)) * rng.poisson(2, n),
    "few samples": lambda rng, n: np.bincount(rng.integers(0, n, rng.integers(1, 200)), minlength=n),
    "weights": lambda rng, n: (rng.random(n) < 0.7) * rng.gamma(0.5, 3.0, n),
    "huge counts": lambda rng, n: rng.integers(0, 2**45, n),
    "uniform": lambda rng, n: np.full(n, rng.integers(1, 100)),
}


class Outcome(NamedTuple):
    case: str
    shape: str
    verdict: str
    error: float
    """The largest error of the curve."""
    judge: str
    """The last curve it was compared with."""


def main(number, seed, jobs):
    """Compare `number` histograms and print the results."""
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        found = pool.imap_unordered(functools.partial(compare, seed), range(number))
        outcomes = list(track(found, "comparing", total=number, console=Console(stderr=True)))
    console, verdicts = Console(width=120), ("same", "tied", "different")
    table = Table("shape", "same index", f"tied within {TIED:g}", "different", "judged exactly", "largest error")
    for shape in SHAPES:
        of_shape = [outcome for outcome in outcomes if outcome.shape == shape]
        counts = (sum(outcome.verdict == verdict for outcome in of_shape) for verdict in verdicts)
        exactly = sum(outcome.judge == "exact" for outcome in of_shape)
        worst = max((outcome.error for outcome in of_shape), default=0.0)
        table.add_row(shape, *map(str, counts), str(exactly), f"{worst:.1e}")
    console.print(table)
    different = [outcome for outcome in outcomes if outcome.verdict == "different"]
    for outcome in different:
        console.print(*outcome)
    return bool(different)


def compare(seed, number):
    """Compare one histogram, which depends on `seed` and `number`."""
    rng, shape = np.random.default_rng([seed, number]), list(SHAPES)[number % len(SHAPES)]
    num_bins = int(rng.choice(SIZES, p=[0.16, 0.14, 0.14, 0.14, 0.14, 0.1, 0.08, 0.06, 0.03, 0.01]))
    levels = int(rng.choice([count for count in LEVELS if count <= num_bins]))
    hist = SHAPES[shape](rng, num_bins)
    edges = klquant.histogram(np.zeros(0), amax=1.0, num_bins=num_bins).edges
    curve = klquant.divergence_curve(hist, edges, num_quantized_bins=levels)
    index = -1
    if np.isfinite(curve).any():
        index = int(klquant.optimal_threshold(hist, edges, num_quantized_bins=levels).index)
    case = f"{number}: {num_bins} bins, {levels} levels, candidate {index}"
    for judge, right in _judges(hist, levels, curve, index):
        outcome = Outcome(case, shape, *_verdict(curve, index, right), judge)
        if outcome.verdict != "different":
            break
    return outcome


@functools.cache
def _loops():
    with tempfile.TemporaryDirectory() as folder:
        return compile_curve(folder)


def _judges(hist, levels, curve, index):
    """Yield curves, each more exact than the last: from the loops in C, the reference, exact arithmetic.

    Loops that add in order lose digits beside a huge bin. Exact arithmetic decides where the reference and the search
    disagree, and for the candidates that either of them prefers.
    """
    if hist.dtype.kind != "f":  # the loops in C count in int64
        yield "C", _loops()(hist, levels)
    right = reference.divergence_curve(hist, levels)
    yield "reference", right
    with np.errstate(invalid="ignore"):
        doubtful = ~(np.abs(curve - right) <= WITHIN / 10) & ~((curve == np.inf) & (right == np.inf))
    for k in {*np.flatnonzero(doubtful).tolist(), index, int(np.argmin(right))} - {-1}:
        right[k] = exact.divergence(hist, levels // 2 + k, levels)
    yield "exact", right


def _verdict(curve, index, right):
    feasible = np.isfinite(right)
    if not np.array_equal(feasible, np.isfinite(curve)):
        return "different", np.inf
    if not feasible.any():
        return "same", 0.0
    error, first = np.abs(curve[feasible] - right[feasible]).max(), int(np.argmin(right))
    if error > WITHIN or right[index] - right[first] > TIED:
        return "different", error
    return ("same" if index == first else "tied"), error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", type=int, nargs="?", default=2000)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--jobs", type=int, default=1)
    sys.exit(main(**vars(parser.parse_args())))
