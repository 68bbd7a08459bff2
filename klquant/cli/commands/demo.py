"""``klquant demo``: its options and tables."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console
from rich.table import Table

from klquant.backends.text import number

from ..group import needed
from ..output import print_next

if TYPE_CHECKING:
    from klquant.demo.run import DemoResult


@click.command()
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="klquant-demo", show_default=True,
              help="Folder for report.json, calibration.npz and plots.")  # fmt: skip
@click.option("--observe", type=click.Choice(["inputs", "outputs"]), default="inputs", show_default=True,
              help="Quantize the inputs of each layer, as engines do, or its outputs.")  # fmt: skip
@click.option(
    "--retrain", is_flag=True, help="Train the network first (about a minute), and save its weights in --out."
)
@click.option("--sample", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
              help="Only write a model and pictures to this folder, to try `klquant auto` on.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of tables.")
def demo(out: Path, observe: Literal["inputs", "outputs"], retrain: bool, sample: Path | None, as_json: bool) -> None:
    """Quantize a small network and compare its accuracy.

    The network is a VGG-style classifier of scikit-learn's handwritten digits. The demo folds its batch norms,
    calibrates it on 512 training images, quantizes it, and compares INT8 with FP32 on 600 test images.

    \b
    Example:
      klquant demo --out results
      klquant demo --sample .
    """  # noqa: D301
    if sample is not None:
        _write_sample(sample)
        return
    status = Console(stderr=True)
    with status.status("loading torch and scikit-learn"):
        digits_module, run_module = (needed(f"klquant.demo.{name}", "demo") for name in ("digits", "run"))
    digits = digits_module.load_images()
    if retrain:
        training = needed("klquant.demo.training", "demo")
        training.save_weights(training.train(digits), out / "digits_vgg.safetensors")
    network = digits_module.load_network(*([out / "digits_vgg.safetensors"] if retrain else []))
    result = run_module.run_demo(network, digits, observe=observe)
    with status.status("drawing"):
        written = run_module.write_files(result, out)
    if as_json:
        click.echo(result.as_json())
        return
    _print_tables(result, run_module)
    click.echo(f"wrote {len(written)} files to {out}/: report.json, calibration.npz and a plot of each layer")
    print_next("klquant", "report", out / "calibration.npz", "-o", out / "report.html")


def _write_sample(folder: Path) -> None:
    with Console(stderr=True).status("loading torch and scikit-learn"):
        model, photos, test = needed("klquant.demo.sample", "demo").write_sample(folder)
    click.echo(f"wrote {model}, {photos} (to calibrate on) and {test} (to measure on)")
    print_next("klquant", "auto", model, "--data", photos, "--engine", "onnxruntime", "-o", folder / "int8.onnx")


def _print_tables(result: "DemoResult", run_module: Any) -> None:
    accuracy = Table("version", "top-1 %", "logit SQNR dB", title="600 test images")
    for name, (top1, sqnr_db) in result.accuracy.items():
        accuracy.add_row(name, f"{top1:.2f}", number(sqnr_db, ".1f", missing=""))
    observe = result.calibration.settings.observe
    layers = Table(
        title=f"quantized {observe} of each layer",
        caption="SQNR in dB: output of the layer; logits with this layer alone quantized",
    )
    first, *numbers = run_module.LAYER_COLUMNS
    layers.add_column(first, min_width=max(len(name) for name in result.layers))
    for title in numbers:
        layers.add_column(title, justify="right")
    folded = Table("module", "kind", "folded into", "reason if not")
    for table, content in ((layers, run_module.summarize(result)), (folded, run_module.summarize_folds(result))):
        for row in content:
            table.add_row(*row)
    Console().print(accuracy, folded, layers)
