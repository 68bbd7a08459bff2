"""INT8 in JAX on trained networks out of other people's packages, beside the float functions.

    python -m tests.tools.bench.jax_models FOLDER [--models NAME ...]

FOLDER, packages and inputs are those of ``tests.tools.bench.real_models``; the ONNX models become JAX functions.
Columns: agreement with FP32 in the network's task, SQNR of its output in dB, products of INT8 that XLA is asked for and
those left in the compiled program, time of one batch as a multiple of FP32.
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2]))
from klquant.backends.accuracy.latency import interleaved_medians
from klquant.backends.jax import calibrate, requantize
from klquant.errors import CalibrationWarning
from support.jax_networks import compiled_s8_products, s8_products
from tools.bench.real import packages
from tools.bench.real.networks import NETWORKS, load
from tools.bench.real.onnx_in_jax import load as load_in_jax

CHOSEN = ("MiniLM-L6", "OriNet", "MTCNN, third net", "CenterFace", "EfficientNet-lite0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="*", default=CHOSEN)
    chosen = parser.parse_args()
    packages.download(chosen.folder)
    console = Console(width=150)
    for name in chosen.models:
        console.print(name, *measure(chosen.folder, name), sep=" | ")


def measure(folder: Path, name: str) -> list[str]:
    """Return the numbers of one network, for each criterion."""
    network = load(folder, name)
    in_jax = load_in_jax(network.path)
    calibration, test = ([tuple(feed[key] for key in in_jax.inputs) for feed in part] for part in network[1:3])
    exact = jax.jit(in_jax.run)
    expected = collect(exact, in_jax.params, test)
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        found = calibrate(in_jax.run, in_jax.params, calibration)
        for criterion in (None, "mse", "max"):
            int8 = requantize(in_jax.run, in_jax.params, calibration[0], found, criterion=criterion)
            score = NETWORKS[name].judge(expected, collect(int8.function, in_jax.params, test), network.arrays)
            rows.append(f"{criterion or 'entropy'} {score.agreement:.3f}, {score.sqnr_db:.1f} dB")
    given = (in_jax.params, *test[0])
    runs = [partial(wait, function, given) for function in (exact, int8.function)]
    float_ms, int8_ms = interleaved_medians(runs, seconds=5)
    asked, left = (sum(count(int8.function, *given).values()) for count in (s8_products, compiled_s8_products))
    return [*rows, f"s8 {asked}, compiled {left}", f"{int8_ms:.1f} / {float_ms:.1f} ms = {int8_ms / float_ms:.2f}"]


def collect(function, params, batches):
    """Return each output over all batches."""
    outputs = [function(params, *batch) for batch in batches]
    return [np.concatenate([np.asarray(each) for each in parts]) for parts in zip(*outputs, strict=True)]


def wait(function, given):
    return jax.block_until_ready(function(*given))


if __name__ == "__main__":
    main()
