"""``klquant quantize``: from a calibration to a model with Q/DQ nodes."""

import math
from pathlib import Path
from typing import Any

import click

from klquant.backends.thresholds import LayerThreshold

from ..group import needed
from ..options import (
    NEW,
    ONNX_MODEL,
    SAVED_CALIBRATION,
    criterion_option,
    engine_option,
    json_option,
    load_calibration,
    override_option,
)
from ..output import busy, print_json, print_table, print_thresholds


@click.command()
@click.argument("model", type=ONNX_MODEL)
@click.argument("calibration", type=SAVED_CALIBRATION)
@engine_option
@click.option("--out", "-o", required=True, type=NEW, help="The quantized model.")
@click.option("--exclude", multiple=True, metavar="PATTERN",
              help="Nodes, tensors or op types that stay in floating point; may be repeated.")  # fmt: skip
@criterion_option(None, "Search T again in the saved histograms.  [default: as calibrated]")
@override_option
@click.option("--reduce-range", is_flag=True, help="Weights in 7 bits, for onnxruntime on CPUs without VNNI.")
@json_option
def quantize(model: Path, calibration: Path, out: Path, engine: str, as_json: bool, **options: Any) -> None:
    """Write an ONNX model with Q/DQ nodes from a calibration.

    CALIBRATION is a file of `klquant calibrate` for the same float MODEL. Its histograms allow for another criterion
    without the data: for all tensors, or for some by --override. A table tells what was quantized, another one what
    stayed in floating point and why.

    \b
    Example:
      klquant quantize model.onnx calib.npz --engine tensorrt -o int8.onnx
      klquant quantize model.onnx calib.npz --engine onnxruntime -o int8.onnx \\
        --criterion mse --override 'head*=max' --exclude Softmax
    """  # noqa: D301
    found = load_calibration(calibration, criterion=options.pop("criterion"), overrides=options.pop("overrides"))
    with busy("loading onnxruntime"):
        backend = needed("klquant.backends.onnx", "onnx")
    quantized = backend.quantize(str(model), found, engine=engine, **options)
    quantized.save(out)
    details = [(name, _as_written(found.thresholds[name], value)) for name, value in quantized.thresholds.items()]
    if as_json:
        tensors = [{"tensor": name, **layer._asdict()} for name, layer in details]
        print_json({"out": out, "engine": engine, "tensors": tensors, "skipped": quantized.skipped})
        return
    print_thresholds(f"{model} for {engine}: in INT8", details)
    print_table("left in floating point", ("node", "why"), quantized.skipped.items())
    click.echo(f"wrote {out}")


def _as_written(found: LayerThreshold, value: float) -> LayerThreshold:
    """Return what is known about T in the model, which is another one where tensors must share a scale."""
    if found.threshold == value:
        return found
    return LayerThreshold(found.amax, value, math.nan, math.nan, criterion="shared")
