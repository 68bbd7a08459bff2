"""``klquant cache-to-qdq``: a calibration cache becomes a model with Q/DQ nodes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from klquant.backends.text import number
from klquant.errors import InvalidInputError

from ..errors import printable
from ..group import needed
from ..options import NEW, ONNX_MODEL, TABLE, engine_option, json_option
from ..output import busy, print_json, print_next, print_table
from .convert import read_thresholds

SHOWN = 5


@click.command()
@click.argument("model", type=ONNX_MODEL)
@click.argument("cache", type=TABLE)
@click.option("--out", "-o", required=True, type=NEW, help="Quantized model to write.")
@engine_option
@click.option("--allow-missing", is_flag=True, help="Exit with 0 even if tensors have no scale.")
@json_option
@click.pass_context
def cache_to_qdq(
    ctx: click.Context, /, model: Path, cache: Path, out: Path, engine: str, allow_missing: bool, as_json: bool
) -> None:
    """Quantize an ONNX model with a TensorRT calibration cache.

    TensorRT 11 has no calibrators. It needs a model with QuantizeLinear and DequantizeLinear nodes. CACHE is the cache
    of an older TensorRT for the same MODEL, or any other table that `klquant convert` reads. Names that are not in
    MODEL are ignored, and tensors without a scale stay in floating point; the output lists both. The exit code is 1 if
    any tensor has no scale, unless you pass --allow-missing.

    \b
    Example:
      klquant cache-to-qdq model.onnx model.cache -o int8.onnx
    """  # noqa: D301
    thresholds = read_thresholds(cache)
    with busy("loading onnxruntime"):
        backend = needed("klquant.backends.onnx", "onnx")
        prepared = backend.prepare(str(model))
    known, wanted = prepared.graph.tensors(), backend.quantizable_tensors(prepared, engine)
    unknown = [name for name in thresholds if name not in known]
    unscaled = [name for name in wanted if name not in thresholds]
    if len(unknown) == len(thresholds):
        why = f"got none of {len(unknown)}: {_some(unknown)}; the model has {_some(wanted)}"
        raise InvalidInputError(f"`{cache}` must contain scales for tensors of `{model}`, {why}")
    quantized = backend.quantize(prepared, thresholds, engine=engine)
    if not quantized.thresholds:
        why = _some([f"node `{name}`: {reason}" for name, reason in quantized.skipped.items()])
        raise InvalidInputError(
            f"`{cache}` must contain all scales that {engine} needs for at least one layer, got none: {why}"
        )
    quantized.save(out)
    found = {"thresholds": quantized.thresholds, "skipped": quantized.skipped}
    if as_json:
        print_json({"out": out, "engine": engine, **found, "not_in_model": unknown, "without_scale": unscaled})
    else:
        _print_tables(f"{model} for {engine}", **found)
        click.echo(f"{len(unknown)} of {len(thresholds)} names in {cache} are not in the model{_listed(unknown)}")
        click.echo(f"{len(unscaled)} of {len(wanted)} tensors to quantize have no scale{_listed(unscaled)}")
        click.echo(f"wrote {out}")
        print_next("klquant", "inspect", out, "--engine", engine)
    if unscaled and not allow_missing:
        ctx.exit(1)


def _print_tables(title: str, thresholds: Mapping[str, float], skipped: Mapping[str, str]) -> None:
    rows = ((name, number(value), number(value / 127)) for name, value in thresholds.items())
    print_table(f"{title}: quantized tensors", ("tensor", "T", "T/127"), rows)
    print_table("left in floating point", ("node", "why"), skipped.items())


def _listed(names: Sequence[str]) -> str:
    return f": {_some(names)}" if names else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(printable, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
