"""``klquant quantize``: a calibration becomes a model with Q/DQ nodes."""

import math
from pathlib import Path
from typing import Any

import click

from klquant.backends.reprs import counted
from klquant.backends.thresholds import LayerThreshold

from ..data import SOURCE, some_batches
from ..group import needed
from ..images import ImageOptions, image_options, options_as_given
from ..options import (
    NEW,
    ONNX_MODEL,
    SAVED_CALIBRATION,
    criterion_option,
    engine_option,
    guard_option,
    json_option,
    load_calibration,
    override_option,
)
from ..output import busy, print_json, print_next, print_table, print_thresholds


@click.command()
@click.argument("model", type=ONNX_MODEL)
@click.argument("calibration", type=SAVED_CALIBRATION)
@engine_option
@click.option("--out", "-o", required=True, type=NEW, help="Quantized model to write.")
@click.option("--exclude", multiple=True, metavar="PATTERN",
              help="Nodes, tensors or op types to keep in floating point; may be repeated.")  # fmt: skip
@criterion_option(None, "Choose T again from the saved histograms.  [default: as calibrated]")
@guard_option
@override_option
@click.option("--data", "--verify", "data", metavar=SOURCE,
              help="Choose ranges, channel scales, layers and biases by this data, and verify the result.")  # fmt: skip
@click.option("--correct-bias/--no-correct-bias", default=None,
              help="Always or never correct biases.  [default: if that lowers the error]")  # fmt: skip
@click.option("--adaround/--no-adaround", default=None,
              help="Always or never round weights for the least change of their layer's outputs.  "
              "[default: with --data, unless the error grows]")  # fmt: skip
@click.option("--min-int8", default=0.8, show_default=True, type=click.FloatRange(0, 1),
              help="Least share of the layers in INT8. With --data the costliest others stay float.")  # fmt: skip
@image_options
@click.option("--symmetric", is_flag=True, help="Use [-T, T] for all tensors that can be negative.")
@click.option("--float16", is_flag=True, help="Compute the rest of the model in float16, for TensorRT 10 or newer.")
@click.option("--skip-slow", is_flag=True,
              help="Leave out layers that NVIDIA's quantizer leaves out because they gain no speed in TensorRT: few "
              "channels, a single row or column.")  # fmt: skip
@click.option("--reduce-range", is_flag=True, help="Use 7-bit weights, for onnxruntime on CPUs without VNNI.")
@json_option
def quantize(
    model: Path, calibration: Path, out: Path, engine: str, data: str | None, as_json: bool, **options: Any
) -> None:
    """Quantize an ONNX model to INT8 with Q/DQ nodes.

    CALIBRATION is the output of `klquant calibrate` for the same float MODEL. Its histograms are enough to try another
    criterion: for all tensors with --criterion, or for some with --override. The first table lists what was quantized;
    the second lists what stays in floating point, and why. `low` and `high` are the ends of the quantized range; the
    other columns describe [-T, T]. `fitted` means that T was adapted to the grid of the engine, or is shared with
    other tensors.

    With --data (as for `klquant calibrate`), klquant widens ranges, scales channels (SmoothQuant), leaves the layers
    that cost most in floating point and corrects biases, each if that lowers the error of the outputs on up to 32
    batches. It rounds weights for the least change of their layer's outputs (AdaRound). It also runs the quantized
    model on the engine, and writes nothing if the results differ from the model as written. --verify is another name
    for --data.

    \b
    Example:
      klquant quantize model.onnx calib.npz --engine tensorrt -o int8.onnx
      klquant quantize model.onnx calib.npz --engine onnxruntime -o int8.onnx \\
        --criterion mse --override 'head*=max' --exclude Softmax
    """  # noqa: D301
    images = ImageOptions(**{name: options.pop(name) for name in ImageOptions._fields})
    searched = {name: options.pop(name) for name in ("criterion", "overrides", "guard")}
    found = load_calibration(calibration, **searched)
    with busy("loading onnxruntime"):
        backend = needed("klquant.backends.onnx", "onnx")
        prepared = backend.prepare(str(model))
    options["asymmetric"] = not options.pop("symmetric")
    batches = some_batches(data, prepared.model, images)
    quantized = backend.quantize(prepared, found, engine=engine, batches=batches, **options)
    quantized.save(out)
    details = [(name, _as_written(found.thresholds[name], value)) for name, value in quantized.thresholds.items()]
    if as_json:
        ranges = quantized.ranges
        tensors = [{"tensor": name, **layer._asdict(), **ranges[name]._asdict()} for name, layer in details]
        verified = None if quantized.verification is None else str(quantized.verification)
        skipped = quantized.skipped
        more = {"verified": verified, "corrections": quantized.corrections, "smoothed": quantized.smoothed}
        more["float_nodes"] = quantized.float_nodes
        print_json({"out": out, "engine": engine, "tensors": tensors, "skipped": skipped, **more})
        return
    print_thresholds(f"{model} for {engine}: quantized tensors", details, quantized.ranges)
    print_table("left in floating point", ("node", "why"), quantized.skipped.items())
    if quantized.smoothed:
        click.echo(f"channels scaled: {counted(len(quantized.smoothed), 'activation')}")
    if quantized.float_nodes:
        click.echo(f"other nodes left in floating point: {counted(len(quantized.float_nodes), 'node')}")
    if quantized.corrections:
        click.echo(f"biases corrected: {len(quantized.corrections)} layers")
    if quantized.verification is not None:
        click.echo(f"verified: {quantized.verification}")
    click.echo(f"wrote {out}")
    if engine == "tensorrt":
        print_next("klquant", "inspect", out, "--engine", engine)
    else:
        print_next("klquant", "compare", model, out, "--data", data or "DATA", *options_as_given(), "--engine", engine)


def _as_written(found: LayerThreshold, value: float) -> LayerThreshold:
    """Return the threshold that the model has. Another than was found is fitted to the grid, or to a shared scale."""
    if found.threshold == value:
        return found
    return LayerThreshold(found.amax, value, math.nan, math.nan, criterion="fitted")
