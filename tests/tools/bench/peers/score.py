"""Scores of logits."""

import math
from typing import NamedTuple

import numpy as np

POINTS, DECIBELS = 0.4, 20.0


class Score(NamedTuple):
    top1: float
    """Share of the images that are classified correctly, in percent; NaN for an untrained network."""
    sqnr_db: float
    """Signal-to-quantization-noise ratio of the logits against those of FP32."""

    def figures(self):
        """Return the cells of a table."""
        top1 = "" if math.isnan(self.top1) else f"{self.top1:.2f}"
        return {"top-1 %": top1, "SQNR dB": "" if math.isinf(self.sqnr_db) else f"{self.sqnr_db:.1f}"}

    def is_near(self, other):
        """Return whether this is as good within 0.4 points, or has at least 20 dB for an untrained network."""
        return self.sqnr_db >= DECIBELS if math.isnan(other.top1) else self.top1 >= other.top1 - POINTS


def score(logits, expected, labels=None):
    """Score logits against those of FP32, and against the labels if there are any."""
    noise = float(np.square(logits - expected, dtype=np.float64).sum())
    top1 = math.nan if labels is None else 100 * float((logits.argmax(1) == labels).mean())
    return Score(top1, 10 * math.log10(np.square(expected, dtype=np.float64).sum() / noise) if noise else math.inf)
