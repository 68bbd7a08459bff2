"""Compare the search with plain loops in C on many random histograms: ``python tests/exactness.py 2000``.

Off by default, for it takes minutes; prints a summary by shape, and exits with 1 if anything differs.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import klquant
from klquant import reference

sys.path.insert(0, str(Path(__file__).parent))
from peers.plain_c import compile_curve

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


def main(number):
    """Compare `number` histograms and print what was found."""
    rng = np.random.default_rng(2026)
    failures, worst = Counter(), dict.fromkeys(SHAPES, 0.0)
    exact, tied = Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        loops = compile_curve(folder)
        for k in track(range(number), "comparing", console=Console(stderr=True)):
            shape = list(SHAPES)[k % len(SHAPES)]
            num_bins = int(rng.choice(SIZES, p=[0.16, 0.14, 0.14, 0.14, 0.14, 0.1, 0.08, 0.06, 0.03, 0.01]))
            levels = int(rng.choice([count for count in LEVELS if count <= num_bins]))
            outcome, error = compare(SHAPES[shape](rng, num_bins), levels, loops)
            {"same": exact, "tied": tied}.get(outcome, failures)[shape] += 1
            worst[shape] = max(worst[shape], error)
    table = Table("shape", "same index", "tied within 1e-15", "different", "largest error of the curve")
    for shape, error in worst.items():
        table.add_row(shape, *(str(counter[shape]) for counter in (exact, tied, failures)), f"{error:.1e}")
    Console(width=100).print(table)
    return failures.total()


def compare(hist, levels, loops):
    """Return how the search compares with the first minimum of the loops, and the largest error of the curve.

    The loops in C add up in order, which costs them up to 1e-12 under a huge bin: where they disagree with the search
    the reference, slower and more exact, decides.
    """
    if hist.dtype.kind == "f":  # the loops in C count in int64
        return _compare_with(reference.divergence_curve(hist, levels), hist, levels)
    outcome, error = _compare_with(loops(hist, levels), hist, levels)
    return (
        (outcome, error)
        if outcome != "different"
        else _compare_with(reference.divergence_curve(hist, levels), hist, levels)
    )


def _compare_with(expected, hist, levels):
    edges = klquant.histogram(np.zeros(0), amax=1.0, num_bins=len(hist)).edges
    curve = klquant.divergence_curve(hist, edges, num_quantized_bins=levels)
    feasible = np.isfinite(expected)
    if not np.array_equal(feasible, np.isfinite(curve)):
        return "different", np.inf
    if not feasible.any():
        return "same", 0.0
    error = np.abs(curve[feasible] - expected[feasible]).max()
    index, first = (
        int(klquant.optimal_threshold(hist, edges, num_quantized_bins=levels).index),
        int(np.argmin(expected)),
    )
    if error > 1e-12 or expected[index] - expected[first] > 1e-15:
        return "different", error
    return ("same" if index == first else "tied"), error


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
