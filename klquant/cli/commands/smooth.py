"""``klquant smooth``: change the weights of a float ONNX model so that INT8 is more accurate."""

from pathlib import Path
from typing import Any

import click

from ..data import Amount, data_option, open_samples
from ..group import needed
from ..images import ImageOptions, image_options, options_as_given
from ..options import NEW, ONNX_MODEL, batch_size_option, json_option, max_samples_option
from ..output import busy, print_json, print_next


@click.command()
@click.argument("model", type=ONNX_MODEL)
@data_option()
@click.option("--out", "-o", required=True, type=NEW, help="Float model to write.")
@click.option("--alpha", type=click.FloatRange(0, 1),
              help="1 evens out the activations, 0 the weights.  [default: chosen for each activation]")  # fmt: skip
@click.option("--equalize", is_flag=True, help="First equalize the weights of successive layers.")
@batch_size_option(8)
@max_samples_option(None)
@image_options
@json_option
def smooth(
    model: Path,
    data: str,
    out: Path,
    alpha: float | None,
    equalize: bool,
    batch_size: int | None,
    max_samples: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Change the weights of an ONNX model so that INT8 is more accurate.

    This is SmoothQuant. The result is a float model that computes the same function as MODEL. Calibrate and quantize it
    instead of MODEL. Smoothing helps where few channels of an activation are far larger than the others, as in
    transformers.

    \b
    Example:
      klquant smooth model.onnx --data samples.npz -o smooth.onnx
      klquant calibrate smooth.onnx --data samples.npz --out calib.npz
      klquant quantize smooth.onnx calib.npz --engine onnxruntime -o int8.onnx
    """  # noqa: D301
    with busy("loading onnxruntime"):
        backend = needed("klquant.backends.onnx", "onnx")
        from klquant.backends.onnx.model.saving import save_model

        prepared = backend.prepare(str(model))
    amount = Amount(batch_size, default_size=8, max_samples=max_samples)
    batches = open_samples(data, ImageOptions(**options), prepared.model, folder=model.parent, amount=amount)
    with busy("smoothing"):
        before = backend.prepare(backend.equalize(prepared)) if equalize else prepared
        smoothed = backend.smooth(before, batches, alpha=alpha)
    save_model(smoothed, out)
    changed = _num_changed(prepared.model, smoothed)
    added = len(smoothed.graph.node) - len(prepared.model.graph.node)
    if as_json:
        print_json({"out": out, "changed": changed, "added": added})
        return
    click.echo(f"{changed} constants changed, {added} nodes added")
    click.echo(f"wrote {out}")
    print_next("klquant", "calibrate", out, "--data", data, *options_as_given(), "--out", "calib.npz")


def _num_changed(before: Any, after: Any) -> int:
    old = {tensor.name: tensor for tensor in before.graph.initializer}
    return sum(tensor.name in old and tensor != old[tensor.name] for tensor in after.graph.initializer)
