"""``klquant compare``: what INT8 costs in accuracy, and what it gains in time and size."""

from pathlib import Path
from typing import Any

import click

from klquant.backends.accuracy.outputs import COLUMNS

from ..data import FOLDERS, Amount, data_option, import_function, open_labels, open_samples
from ..group import needed
from ..images import ImageOptions, image_options
from ..options import ONNX_MODEL, Choice, batch_size_option, json_option
from ..output import busy, print_table


@click.command()
@click.argument("float_model", metavar="FLOAT", type=ONNX_MODEL)
@click.argument("int8_model", metavar="INT8", type=ONNX_MODEL)
@data_option("Data that calibration has not seen.")
@click.option("--engine", type=Choice(["onnxruntime", "openvino"]), default="onnxruntime", show_default=True,
              help="What runs both models, on one thread.")  # fmt: skip
@click.option("--labels", metavar=f"{FOLDERS.upper()}|FILE",
              help=f"True classes: `{FOLDERS}`, or an .npy or .npz file.")  # fmt: skip
@click.option("--metric", metavar="MODULE:FUNCTION", help="A measure of your task, see above.")
@batch_size_option(8)
@image_options
@json_option
def compare(
    float_model: Path,
    int8_model: Path,
    data: str,
    engine: str,
    labels: str | None,
    metric: str | None,
    batch_size: int | None,
    as_json: bool,
    **images: Any,
) -> None:
    """Compare an INT8 model with its float model: outputs, time and size.

    Both models run over the data (as for `klquant calibrate`). The table has, for each output, the signal to noise
    ratio, the cosine, and for scores of classes how often the best class is the same. The last line has the median time
    of a batch, measured in turns, and the sizes.

    With --labels the table has the accuracy of both models. `folders` takes images in one folder for each class, and
    numbers the classes in the order of these names. A file holds one integer for each sample; an .npz file holds them
    as `labels`. --metric names a function of two lists, the outputs of both models: a dict of arrays by name for each
    batch. It returns a number.

    \b
    Example:
      klquant compare float.onnx int8.onnx --data samples.npz
      klquant compare float.onnx int8.onnx --data photos/ --image-size 224x224 \\
        --labels folders --engine openvino
    """  # noqa: D301
    with busy(f"loading {engine}"):
        backend = needed("klquant.backends.onnx", "onnx")
        loaded = needed("onnx", "onnx").load(str(float_model), load_external_data=False)
    result = backend.compare(
        str(float_model),
        str(int8_model),
        open_samples(data, ImageOptions(**images), loaded, amount=Amount(batch_size, default_size=8)),
        engine=engine,
        labels=None if labels is None else open_labels(labels, data),
        metric=None if metric is None else import_function(metric, "--metric"),
        progress=True,
    )
    if as_json:
        click.echo(result.as_json())
        return
    print_table(f"{int8_model} against {float_model} on {engine}", COLUMNS, (one.cells() for one in result.outputs))
    click.echo(str(result))
