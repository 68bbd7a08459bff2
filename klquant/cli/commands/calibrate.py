"""``klquant calibrate``: a float ONNX model and data become a file of histograms and thresholds."""

from pathlib import Path
from typing import Any

import click

from ..data import Amount, data_option, open_samples
from ..group import needed
from ..images import ImageOptions, image_options, options_as_given
from ..options import (
    NEW,
    ONNX_MODEL,
    batch_size_option,
    criterion_option,
    guard_option,
    json_option,
    keep_bytes_option,
    max_samples_option,
    override_option,
)
from ..output import busy, print_json, print_next, print_table, print_thresholds, threshold_record


@click.command()
@click.argument("model", type=ONNX_MODEL)
@data_option("Calibration data, see above.")
@click.option("--out", "-o", required=True, type=NEW, help="Calibration to write, an .npz file.")
@criterion_option("entropy", "How to choose each threshold T; auto: the best for each tensor.", others=["auto"])
@guard_option
@override_option
@click.option("--num-bins", type=int, default=4001, show_default=True, help="Bins of each histogram, an odd number.")
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Tensors to observe; may be repeated.  [default: all]"
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Tensors to leave out; may be repeated.")
@click.option("--dead-channel", type=click.FloatRange(min=0), default=0.0, metavar="SIZE",
              help="Zero the channels whose weights are all below this.  [default: change none]")  # fmt: skip
@batch_size_option(32)
@max_samples_option(None)
@keep_bytes_option
@image_options
@json_option
def calibrate(
    model: Path, data: str, out: Path, batch_size: int | None, max_samples: int | None, as_json: bool, **options: Any
) -> None:
    """Calibrate an ONNX model on sample data.

    The float MODEL runs over the data twice: once for the range and once for the histogram of each tensor that an
    engine may quantize. Batches whose tensors fit into --keep-bytes run only once. Otherwise memory use does not grow
    with the data. The output holds these histograms and the thresholds chosen from them. Equal activations give equal
    results, in any batches and order.

    \b
    --data is one of
      a folder of .npy or .npz files, in the order of their names: each file is
        one batch, or with --batch-size one sample without a batch axis;
        arrays in .npz files are named like the model's inputs
      a folder of .png, .jpg, .bmp or .webp images, read as
        (rgb / 255 - mean) / std
      an .npy file, or an .npz file with arrays named like the model's inputs;
        the first axis counts the samples
      module:function in the current folder; the function returns the batches
        (arrays, or dicts by input name) and is called once per pass

    \b
    Example:
      klquant calibrate model.onnx --data samples/ --out calib.npz
      klquant calibrate model.onnx --data photos/ --image-size 224x224 \\
        --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --out calib.npz
      klquant calibrate model.onnx --data mydata:batches --out calib.npz \\
        --criterion entropy --override 'head*=max'

    PATTERN is a shell pattern that matches names of tensors. Where the entropy criterion clips too much, klquant takes
    the better of mse and max, and the table says so: `entropy -> mse: 13.2 dB`. With --no-guard a warning lists such
    tensors, each with a better criterion to pass with --override, here or to `klquant quantize`.
    """  # noqa: D301
    images = ImageOptions(**{name: options.pop(name) for name in ImageOptions._fields})
    settings = {**options, "include": options["include"] or "*", "guard": options["guard"] is not False}
    with busy("loading onnxruntime"):
        backend = needed("klquant.backends.onnx", "onnx")
        prepared = backend.prepare(str(model))
    amount = Amount(batch_size, max_samples=max_samples)
    batches = open_samples(data, images, prepared.model, folder=model.parent, amount=amount)
    calibration = backend.calibrate(prepared, batches, progress=True, **settings)
    calibration.save(out)
    if as_json:
        found = [threshold_record(*item) for item in calibration.thresholds.items()]
        print_json({"out": out, "batches": calibration.num_batches, "tensors": found, "skipped": calibration.skipped})
        return
    print_thresholds(f"{model}: {calibration.num_batches} batches", calibration.thresholds.items())
    if calibration.skipped:
        print_table("left in floating point", ("tensor", "why"), calibration.skipped.items())
    click.echo(f"wrote {out}")
    given = ("--data", data, *options_as_given())
    print_next("klquant", "quantize", model, out, "--engine", "ENGINE", *given, "-o", "int8.onnx")
