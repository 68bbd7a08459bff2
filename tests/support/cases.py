"""Histograms whose divergences are known without klquant: golden files, and cases worked out by hand."""

import json
from math import log
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

DATA = Path(__file__).parent / "data"


class Golden(NamedTuple):
    name: str
    hist: np.ndarray
    edges: np.ndarray
    divergence: np.ndarray
    ok_index: np.ndarray

    @property
    def feasible(self):
        return len(self.ok_index) > 0

    @property
    def exact_tie(self):
        return len(set(self.divergence[self.ok_index].tolist())) == 1


class ByHand(NamedTuple):
    name: str
    hist: list
    num_quantized_bins: int
    eps: float
    divergence: list


def _load(name):
    with np.load(DATA / "golden.npz") as arrays:
        return Golden(name, *(arrays[f"{name}/{field}"] for field in Golden._fields[1:]))


_LISTED = json.loads((DATA / "golden.json").read_text())


def golden(*bins):
    """Return the golden cases with these numbers of bins (by default all) as pytest parameters."""
    return golden_named(*(case["name"] for case in _LISTED if not bins or case["bins"] in bins))


def golden_named(*names):
    return [pytest.param(_load(name), id=name) for name in names]


def listed(name):
    """Return the entry of a case in golden.json."""
    return next(case for case in _LISTED if case["name"] == name)


BY_HAND = [
    # P = [1, 2, 1] / 4; S = [0, 2, 1] is already Q, and smoothed [0.5, 1.75, 0.75] / 3
    ByHand("no outliers", [1, 2, 1], 3, 0.5, [log(1.5) / 4 + log(6 / 7) / 2]),
    # half-width 1: P = [1 + 0, 2, 2 + 1] / 6, S = [0, 2, 2], smoothed Q = [0.5, 1.75, 1.75] / 4;
    # half-width 2: P = [1, 0, 2, 2, 1] smoothed [0.875, 0.5, 1.875, 1.875, 0.875] / 6,
    #               groups {0} {1} {2, 3, 4}: the last takes the remainder; Q = [0, 0, 5, 5, 5] / 3, smoothed
    #               [0.5, 0.5, 4/3, 4/3, 4/3] / 5
    ByHand(
        "remainder",
        [1, 0, 2, 2, 1],
        3,
        0.5,
        [
            log(4 / 3) / 6 + log(16 / 21) / 3 + log(8 / 7) / 2,
            7 / 48 * log(35 / 24) + log(5 / 6) / 12 + 5 / 8 * log(75 / 64) + 7 / 48 * log(35 / 64),
        ],
    ),
    # half-width 1: P = [4, 0, 2], S = [0, 0, 0]: Q has nothing to smooth with;
    # half-width 2: P = [4, 0, 0, 0, 2] smoothed [3.7, 0.2, 0.2, 0.2, 1.7] / 6,
    #               S = [0, 0, 0, 0, 2], Q = [0, 0, 0, 0, 2] smoothed [0.2, 0.2, 0.2, 0.2, 1.2] / 2
    ByHand(
        "only the ends",
        [4, 0, 0, 0, 2],
        3,
        0.2,
        [float("inf"), 3.7 / 6 * log(37 / 6) + 0.1 * log(1 / 3) + 1.7 / 6 * log(1.7 / 3.6)],
    ),
    # half-width 2 of 5 levels merges nothing and loses nothing: P = Q, because only the first bin is empty
    ByHand("equal", [0, 3, 8, 3, 1], 5, 0.5, [0.0]),
    # half-width 3, size 2: P = [1, 1, 4, 0, 2, 2, 4], S = [0, 1, ...], groups {0, 1} {2, 3} {4, 5, 6}
    # give Q = [0.5, 0.5, 4, 0, 8/3, 8/3, 8/3]; one zero costs each of the six others 0.6 / 6 = 0.1
    ByHand(
        "merged in pairs",
        [1, 1, 4, 0, 2, 2, 4],
        3,
        0.6,
        [
            # half-width 1: P = [6, 0, 8], S = Q = [0, 0, 2]: two zeros would cost the one other 1.2 >= 1
            float("inf"),
            # half-width 2: P = [2, 4, 0, 2, 6], S = [0, 4, 0, 2, 2], groups {0} {1} {2, 3, 4}: Q = [0, 4, 0, 2, 2],
            # smoothed [1.85, 3.85, 0.6, 1.85, 5.85] / 14 and [0.6, 3.6, 0.6, 1.6, 1.6] / 8
            1.85 / 14 * log(1.85 * 8 / (0.6 * 14))
            + 3.85 / 14 * log(3.85 * 8 / (3.6 * 14))
            + 0.6 / 14 * log(8 / 14)
            + 1.85 / 14 * log(1.85 * 8 / (1.6 * 14))
            + 5.85 / 14 * log(5.85 * 8 / (1.6 * 14)),
            0.9 / 14 * log(0.9 * 13 / (0.4 * 14)) * 2
            + 3.9 / 14 * log(13 / 14)
            + 0.6 / 14 * log(13 / 14)
            + 1.9 / 14 * log(1.9 * 13 / ((8 / 3 - 0.1) * 14)) * 2
            + 3.9 / 14 * log(3.9 * 13 / ((8 / 3 - 0.1) * 14)),
        ],
    ),
]


def by_hand(*names):
    return [pytest.param(case, id=case.name) for case in BY_HAND if not names or case.name in names]


def even_edges(num_bins):
    """Return the edges of bins of width 1 around 0."""
    return np.arange(num_bins + 1) - num_bins / 2
