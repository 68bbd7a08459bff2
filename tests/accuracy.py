"""Accuracy of INT8 on trained networks, one row for each way to get there: ``python tests/accuracy.py``.

With ``--json`` the table is printed as JSON.
"""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from digits_networks import NETWORKS, load
from klquant.backends.torch import (
    LayerThreshold,
    collect_amax,
    collect_histograms,
    fold_batch_norm,
    fold_relu,
    quantize_weights,
    search_thresholds,
    simulate,
)
from klquant.backends.torch.bias_correction import correct_bias
from klquant.backends.torch.equalization import equalize

import klquant
from klquant.demo.digits import load_images

NUM_CALIBRATION = 512
BATCH_SIZE = 64


class Recipe(NamedTuple):
    """A way from FP32 to INT8."""

    criterion: str = "entropy"
    equalized: bool = False
    corrected: bool = False


class Score(NamedTuple):
    top1: float
    """Share of the test images classified right, in percent."""
    sqnr_db: float | None
    """Signal to quantization noise of the logits against FP32, in dB; None for FP32 itself."""


RECIPES = {
    "INT8 entropy (default)": Recipe(),
    "INT8 max": Recipe("max"),
    "INT8 mse": Recipe("mse"),
    "INT8 percentile": Recipe("percentile"),
    "INT8 entropy, min_ratio 0.7": Recipe("entropy, min_ratio 0.7"),
    "INT8 entropy + equalize": Recipe(equalized=True),
    "INT8 entropy + bias correction": Recipe(corrected=True),
    "INT8 entropy + equalize + bias correction": Recipe(equalized=True, corrected=True),
    "INT8 max + equalize": Recipe("max", equalized=True),
    "INT8 mse + equalize": Recipe("mse", equalized=True),
}  # a criterion "auto" that needs more than histograms goes into _thresholds


class Prepared(NamedTuple):
    """A folded network with what was observed in it; recipes share it."""

    model: torch.nn.Module
    batches: tuple
    amax: dict
    histograms: dict


def prepare(network, digits, *, equalized=False):
    batches = digits.train_images[:NUM_CALIBRATION].split(BATCH_SIZE)
    model, _ = fold_batch_norm(network, batches[0])
    model, _ = fold_relu(model, batches[0])
    if equalized:
        model, _ = equalize(model, batches[0])
    amax = collect_amax(model, batches)
    return Prepared(model, batches, amax, collect_histograms(model, batches, amax))


def convert(prepared, recipe):
    """Return the simulated INT8 network."""
    model = simulate(prepared.model, quantize_weights(prepared.model), _thresholds(prepared, recipe.criterion))
    return correct_bias(model, prepared.model, prepared.batches)[0] if recipe.corrected else model


def _thresholds(prepared, criterion):
    if criterion != "entropy, min_ratio 0.7":
        return search_thresholds(prepared.amax, prepared.histograms, criterion=criterion)
    return {name: _with_floor(prepared.amax[name], histogram) for name, histogram in prepared.histograms.items()}


def _with_floor(amax, histogram):
    hist = histogram.hist.copy()
    hist[len(hist) // 2] = 0
    found = klquant.optimal_threshold(hist, histogram.edges, min_ratio=0.7)
    return LayerThreshold(amax, float(found.value), float(found.divergence), float(found.clipped))


def logits(model, images):
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(BATCH_SIZE)])


def score(model, reference, digits):
    """Judge a model on the test images, its logits against those of the reference."""
    expected, got = (logits(m, digits.test_images) for m in (reference, model))
    top1 = 100 * float((got.argmax(1) == digits.test_labels).double().mean())
    noise = float((got - expected).double().square().sum())
    return Score(top1, 10 * math.log10(float(expected.double().square().sum()) / noise) if noise else None)


def measure(network, digits):
    """Return the scores of FP32 and of all recipes."""
    prepared = {equalized: prepare(network, digits, equalized=equalized) for equalized in (False, True)}
    scores = {"FP32": score(network, network, digits)}
    for name, recipe in RECIPES.items():
        scores[name] = score(convert(prepared[recipe.equalized], recipe), network, digits)
    return scores


def main(arguments):
    digits = load_images()
    scores = {name: measure(load(name), digits) for name in track(NETWORKS, "measuring", console=Console(stderr=True))}
    if "--json" in arguments:
        numbers = {network: {k: s._asdict() for k, s in each.items()} for network, each in scores.items()}
        Console().print_json(json.dumps(numbers))
        return
    table = Table("top-1 %, logit SQNR dB", *scores)
    for recipe in ("FP32", *RECIPES):
        table.add_row(recipe, *(_cell(each[recipe]) for each in scores.values()))
    Console(width=120).print(table)


def _cell(score):
    return f"{score.top1:.2f}" if score.sqnr_db is None else f"{score.top1:.2f}  {score.sqnr_db:.1f}"


if __name__ == "__main__":
    main(sys.argv[1:])
