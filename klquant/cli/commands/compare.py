"""``klquant compare``: what INT8 costs in accuracy, and what it gains in time and size."""

from pathlib import Path
from typing import Any

import click

from klquant.backends.accuracy.outputs import COLUMNS

from ..data import Amount, data_option, import_function, open_samples
from ..group import needed
from ..images import ImageOptions, image_options
from ..labels import FOLDERS, labels_of
from ..options import ONNX_MODEL, Choice, batch_size_option, json_option, max_samples_option
from ..output import busy, print_table


@click.command()
@click.argument("float_model", metavar="FLOAT", type=ONNX_MODEL)
@click.argument("int8_model", metavar="INT8", type=ONNX_MODEL)
@data_option("Data that calibration has not seen.")
@click.option("--engine", type=Choice(["onnxruntime", "openvino"]), default="onnxruntime", show_default=True,
              help="Engine that runs both models, on one thread.")  # fmt: skip
@click.option("--labels", metavar=f"{FOLDERS.upper()}|FILE",
              help=f"True classes: `{FOLDERS}`, or an .npy or .npz file.")  # fmt: skip
@click.option("--metric", metavar="MODULE:FUNCTION", help="Function that measures your task, see above.")
@batch_size_option(8)
@max_samples_option(None)
@image_options
@json_option
def compare(
    float_model: Path,
    int8_model: Path,
    data: str,
    engine: str,
    labels: str | None,
    metric: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare an INT8 model with its float model: outputs, time and size.

    Both models run over the data (as for `klquant calibrate`). For each output, the table shows the signal-to-noise
    ratio, the cosine, and for class scores how often both models choose the same class. The last line shows the median
    time of a batch, measured in turns, and the file sizes.

    With --labels the table shows the accuracy of both models. `folders` expects images in one folder per class, and
    numbers the classes in the order of the folder names. A file holds one integer per sample; in an .npz file the array
    is called `labels`. --metric names a function of two lists, the outputs of the float and of the INT8 model, with a
    dict of arrays by name for each batch. It returns a number; larger is better.

    \b
    Example:
      klquant compare float.onnx int8.onnx --data samples.npz
      klquant compare float.onnx int8.onnx --data photos/ --image-size 224x224 \\
        --labels folders --engine openvino
    """  # noqa: D301
    with busy(f"loading {engine}"):
        backend = needed("klquant.backends.onnx", "onnx")
        loaded = needed("onnx", "onnx").load(str(float_model), load_external_data=False)
    amount = Amount(options.pop("batch_size"), default_size=8, max_samples=options.pop("max_samples"))
    batches = open_samples(data, ImageOptions(**options), loaded, amount=amount)
    result = backend.compare(
        str(float_model),
        str(int8_model),
        batches,
        engine=engine,
        labels=None if labels is None else labels_of(labels, data, batches),
        metric=None if metric is None else import_function(metric, "--metric"),
        progress=True,
    )
    if as_json:
        click.echo(result.as_json())
        return
    print_table(f"{int8_model} against {float_model} on {engine}", COLUMNS, (one.cells() for one in result.outputs))
    click.echo(str(result))
