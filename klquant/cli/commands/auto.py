"""``klquant auto``: one command from a float model and data to a verified INT8 model with a measured accuracy."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from klquant.backends.automatic import COLUMNS, Advice, Automatic
from klquant.backends.settings import ENGINES

from ..data import SOURCE, Amount, data_option, import_function, open_samples
from ..group import needed
from ..images import ImageOptions, image_options
from ..options import NEW, ONNX_MODEL, Choice, batch_size_option, json_option, max_samples_option, override_option
from ..output import busy, print_table

MIN_BATCHES = 8  # so that a quarter of them can be held back
# Options that other commands lack, with their number of words
_NOT_IN_TUNE = {"--report": 2, "--max-seconds": 2, "--json": 1}
_OF_THE_RESULT = dict.fromkeys(("--out", "-o", "--engine", "--target", "--validation", "--calibration"), 2)
_NOT_IN_COMPARE = {**_NOT_IN_TUNE, **_OF_THE_RESULT, "--metric": 2, "--max-samples": 2, "--override": 2}


@click.command()
@click.argument("model", type=ONNX_MODEL)
@data_option()
@click.option("--engine", type=Choice(ENGINES), required=True, help="Engine that will run the model.")
@click.option("--out", "-o", required=True, type=NEW, help="Quantized model to write.")
@click.option("--report", type=NEW, help="HTML report to write.  [default: like --out, with .html]")
@click.option("--target", default="0.99", show_default=True, metavar="30dB|0.99",
              help="What is accurate enough: an SQNR of the worst output, or a value of the metric.")  # fmt: skip
@click.option("--metric", metavar="MODULE:FUNCTION", help="Function that measures your task, as for `klquant compare`.")
@click.option("--validation", metavar=SOURCE, help="Data to measure on.  [default: every fourth batch of --data]")
@click.option("--max-seconds", type=click.FloatRange(min=1), default=240, show_default=True,
              help="Start no further attempt after this time.")  # fmt: skip
@max_samples_option(256)
@batch_size_option(8)
@override_option
@image_options
@json_option
@click.pass_context
def auto(ctx: click.Context, /, model: Path, out: Path, report: Path | None, **options: Any) -> None:
    """Quantize an ONNX model, verify the result and measure what it costs.

    The command calibrates the model on three quarters of the data, quantizes it by each criterion and with each
    correction, and compares every result with the float MODEL on the rest of the data. It runs the best one on its
    engine and checks it tensor by tensor. It prints a table, a verdict and the next commands, and writes the model and
    an HTML report. `*` marks the model that is written.

    Agreement is the share of samples for which both models choose the same class. For outputs that are not class scores
    it is the cosine between both outputs. The exit code is 1 if the result misses --target. TensorRT needs a GPU, so
    onnxruntime runs the graph as written instead.

    \b
    Example:
      klquant auto model.onnx --data photos/ --engine onnxruntime -o int8.onnx
      klquant auto model.onnx --data samples.npz --engine tensorrt -o int8.onnx
    """  # noqa: D301
    with busy("loading onnxruntime"):
        backend = needed("klquant.backends.onnx", "onnx")
        reporting = needed("klquant.backends.report", "report")
        prepared = backend.prepare(str(model))
    as_json = options.pop("as_json")
    _open_data(options, prepared.model, model.parent)
    if options["metric"] is not None:
        options["metric"] = import_function(options["metric"], "--metric")
    result = backend.auto(str(model), options.pop("data"), progress=True, **options)
    page = report or out.with_suffix(".html")
    steps = _next_steps(result, model, out, ctx.meta["klquant.arguments"])
    ways = [dict(zip(COLUMNS, row, strict=True)) for row in result.rows()]
    result.quantized.save(out)
    reporting.write_report(
        result.calibration, page, title=model.name, verdict=result.verdict, ways=ways, next_steps=steps
    )
    if as_json:
        click.echo(result.as_json())
    else:
        _print(result, f"{model} on {options['engine']}", steps)
        click.echo(f"wrote {out} and {page}")
    if not result.reached:
        ctx.exit(1)


def _open_data(options: dict[str, Any], model: Any, folder: Path) -> None:
    """Replace what `--data` and `--validation` name by batches, and take the options for images out."""
    images = ImageOptions(**{name: options.pop(name) for name in ImageOptions._fields})
    sizes = {name: options.pop(name) for name in ("batch_size", "max_samples")}
    amount = Amount(**sizes, default_size=8, min_batches=MIN_BATCHES)
    options["data"] = open_samples(options["data"], images, model, folder=folder, amount=amount)
    if options["validation"] is not None:
        options["validation"] = open_samples(options["validation"], images, model, amount=amount)


def _print(result: Automatic[Any], title: str, steps: Sequence[str]) -> None:
    print_table(title, COLUMNS, result.rows())
    if result.left_out:
        click.echo(f"not tried within --max-seconds: {', '.join(result.left_out)}")
    click.echo(f"\n{result.verdict}")
    click.echo(f"Verified: {result.verification}\n\nNext:")
    for step in steps:
        click.echo(f"  {step}")


def _next_steps(result: Automatic[Any], model: Path, out: Path, arguments: Sequence[str]) -> list[str]:
    """Return what to do next as command lines to paste, with a comment each."""
    given = arguments[arguments.index("auto") + 1 :]
    options, engine = _without(given, _NOT_IN_COMPARE, str(model)), _value_of(given, "--engine")
    pair, data = shlex.join([str(model), str(out)]), Path(_value_of(given, "--data"))
    labels = "folders" if data.is_dir() and any(path.is_dir() for path in data.iterdir()) else "LABELS.npy"
    compared = f"{pair} {shlex.join(options)} --engine {'onnxruntime' if engine == 'tensorrt' else engine}"
    texts: dict[Advice, str] = {
        "verify": "# please report this at https://github.com/klquant/klquant/issues",
        "tune": f"klquant tune {shlex.join(_without(given, _NOT_IN_TUNE))}  # leaves out the worst layers",
        "held-out": f"# there is little data: pass more that calibration has not seen by --validation {SOURCE}",
        "data": f"# only {result.data.measured} samples to measure on: 100 to 500 typical ones give reliable numbers",
        "inspect": f"klquant inspect {shlex.quote(str(out))} --engine {engine}  # lists what is not in INT8, and why",
        "slow": "# INT8 is slower here: measure on the machine that will run the model",
        "labels": f"klquant compare {compared} --labels {labels}  # accuracy on your labels",
    }
    return [texts[name] for name in result.advice]


def _value_of(arguments: Sequence[str], option: str) -> str:
    """Return the value of an option as it was given."""
    for k, text in enumerate(arguments):
        if text == option:
            return arguments[k + 1]
        if text.startswith(f"{option}="):
            return text.partition("=")[2]
    return option.strip("-").upper()


def _without(arguments: Sequence[str], options: Mapping[str, int], positional: str = "") -> list[str]:
    """Return arguments without these options, whose number of words is given, and without one that is no option."""
    kept: list[str] = []
    skipped = 0
    for text in arguments:
        name, separator, _ = text.partition("=")
        skipped = (1 if separator else options[name]) if name in options else skipped
        if not skipped and text != positional:
            kept.append(text)
        skipped = max(skipped - 1, 0)
    return kept
