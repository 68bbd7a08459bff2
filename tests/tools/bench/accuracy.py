"""Accuracy of INT8 on trained networks, one row for each recipe: ``python tests/tools/bench/accuracy.py``.

``--json`` prints the table as JSON.
"""

import json
import math
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))
from klquant import CalibrationWarning
from klquant.backends.torch import quantize
from klquant.demo.digits import load_images
from support.digits_networks import NETWORKS, load

NUM_CALIBRATION = 512
BATCH_SIZE = 64
RECIPES = {
    "INT8 entropy (default)": {},
    "INT8 entropy, guard=False": {"guard": False},
    "INT8 max": {"criterion": "max"},
    "INT8 mse": {"criterion": "mse"},
    "INT8 percentile": {"criterion": "percentile"},
    "INT8 auto": {"criterion": "auto"},
    "INT8 entropy, min_ratio 0.7": {"overrides": {"*": {"min_ratio": 0.7}}},
    "INT8 entropy + equalize": {"equalize": True},
    "INT8 entropy + bias correction": {"correct_bias": True},
    "INT8 entropy + equalize + bias correction": {"equalize": True, "correct_bias": True},
    "INT8 max + equalize": {"criterion": "max", "equalize": True},
    "INT8 mse + equalize": {"criterion": "mse", "equalize": True},
    "INT8 auto + equalize": {"criterion": "auto", "equalize": True},
}


class Score(NamedTuple):
    top1: float
    """Share of the test images that are classified correctly, in percent."""
    sqnr_db: float | None
    """Signal-to-quantization-noise ratio of the logits against FP32, in dB; None for FP32 itself."""


def convert(network, digits, recipe):
    """Return the simulated INT8 network."""
    batches = digits.train_images[:NUM_CALIBRATION].split(BATCH_SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # the table shows the same
        return quantize(network, batches, **RECIPES[recipe]).model


def logits(model, images):
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(BATCH_SIZE)])


def score(model, reference, digits):
    """Score a model on the test images, and its logits against those of the reference."""
    expected, got = (logits(m, digits.test_images) for m in (reference, model))
    top1 = 100 * float((got.argmax(1) == digits.test_labels).double().mean())
    noise = float((got - expected).double().square().sum())
    return Score(top1, 10 * math.log10(float(expected.double().square().sum()) / noise) if noise else None)


def measure(network, digits):
    """Return the scores of FP32 and of all recipes."""
    models = {"FP32": network, **{recipe: convert(network, digits, recipe) for recipe in RECIPES}}
    return {name: score(model, network, digits) for name, model in models.items()}


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
