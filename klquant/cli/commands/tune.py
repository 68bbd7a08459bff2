"""``klquant tune``: try settings on the engine itself until the result is accurate enough."""

import json
from pathlib import Path
from typing import Any

import click

from klquant.backends.accuracy.trials import COLUMNS
from klquant.backends.settings import ENGINES

from ..data import SOURCE, Amount, data_option, import_function, open_samples
from ..group import needed
from ..images import ImageOptions, image_options
from ..options import NEW, ONNX_MODEL, Choice, batch_size_option, json_option, max_samples_option, override_option
from ..output import busy, print_next, print_table


@click.command()
@click.argument("model", type=ONNX_MODEL)
@data_option()
@click.option("--engine", type=Choice(ENGINES), required=True, help="Engine that will run the model.")
@click.option("--out", "-o", required=True, type=NEW, help="Quantized model to write.")
@click.option("--target", default="0.99", show_default=True, metavar="30dB|0.99",
              help="SQNR of the worst output, or a value of the metric.")  # fmt: skip
@click.option("--metric", metavar="MODULE:FUNCTION", help="Function that measures your task, as for `klquant compare`.")
@click.option("--validation", metavar=SOURCE, help="Data to measure on.  [default: every fourth batch of --data]")
@click.option(
    "--max-runs", type=click.IntRange(min=1), default=40, show_default=True, help="Largest number of models to try."
)
@click.option("--min-int8", type=click.FloatRange(0, 1), default=0.8, show_default=True,
              help="Smallest share of Conv, ConvTranspose, Gemm and MatMul that stays in INT8.")  # fmt: skip
@click.option("--resume", type=NEW, help="JSON file that keeps the trials. If it exists, its trials are not repeated.")
@click.option("--calibration", type=NEW,
              help="Also write the calibration of the result, and the float model that it fits if a step such as "
                   "smooth changed MODEL.")  # fmt: skip
@batch_size_option(8)
@max_samples_option(None)
@override_option
@image_options
@json_option
@click.pass_context
def tune(
    ctx: click.Context,
    /,
    model: Path,
    out: Path,
    calibration: Path | None,
    batch_size: int | None,
    max_samples: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Try settings until the INT8 model is accurate enough.

    Each trial runs on the engine and is compared with the float MODEL. klquant tries the criteria and corrections
    first. Then it leaves layers in floating point, beginning with those that cost the outputs most. The table shows
    what each trial gains and costs; `*` marks the model that is written. If no trial reaches the target, klquant writes
    the most accurate model, and the exit code is 1.

    Without --metric, a target such as 0.99 is the agreement of the worst output with the float model. For class scores
    it is how often both choose the same class, for other outputs the cosine. TensorRT needs a GPU, so onnxruntime runs
    the graph as written instead.

    \b
    Example:
      klquant tune model.onnx --data samples.npz --engine onnxruntime \\
        --target 30dB -o int8.onnx
      klquant tune model.onnx --data photos/ --image-size 640x640 \\
        --engine openvino --metric mytask:f1 --resume trials.json -o int8.onnx
    """  # noqa: D301
    images = ImageOptions(**{name: options.pop(name) for name in ImageOptions._fields})
    with busy("loading onnxruntime"):
        backend = needed("klquant.backends.onnx", "onnx")
        prepared = backend.prepare(str(model))
    amount = Amount(batch_size, default_size=8, max_samples=max_samples)
    for name in ("data", "validation"):
        if options[name] is not None:
            options[name] = open_samples(options[name], images, prepared.model, folder=model.parent, amount=amount)
    if options["metric"] is not None:
        options["metric"] = import_function(options["metric"], "--metric")
    tuned = backend.tune(prepared, options.pop("data"), progress=True, **options)
    tuned.quantized.save(out)
    written = [out, *_save_calibration(tuned, calibration)]
    if as_json:
        click.echo(tuned.trace.as_json())
    else:
        print_table(f"{model} on {options['engine']}", COLUMNS, tuned.trace.rows())
        click.echo(str(tuned.trace))
        click.echo(f"settings: {json.dumps(tuned.trace.best.recipe._asdict())}")
        click.echo(f"wrote {', '.join(map(str, written))}")
        print_next("klquant", "inspect", out, "--engine", options["engine"])
    if not tuned.trace.reached:
        ctx.exit(1)


def _save_calibration(tuned: Any, path: Path | None) -> list[Path]:
    """Write the calibration, and beside it the float model that it fits if that is not MODEL; return the paths."""
    if path is None:
        return []
    tuned.calibration.save(path)
    if tuned.model is None:
        return [path]
    from klquant.backends.onnx.accuracy.steps import changes_of
    from klquant.backends.onnx.model.saving import save_model

    changed = path.with_name(f"{path.stem}_{'_'.join(changes_of(tuned.trace.best.recipe))}.onnx")
    save_model(tuned.model, changed)
    return [path, changed]
