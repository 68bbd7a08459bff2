"""``klquant cache-to-qdq``: an old calibration cache, for engines that want Q/DQ nodes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from klquant.errors import InvalidInputError

from .convert import read_thresholds
from .group import needed
from .options import EXISTING, NEW, json_option, profile_option
from .tables import busy, number, print_json, print_table

SHOWN = 5


@click.command()
@click.argument("model", type=EXISTING)
@click.argument("cache", type=EXISTING)
@click.option("--out", "-o", required=True, type=NEW, help="The quantized model.")
@profile_option
@json_option
def cache_to_qdq(model: Path, cache: Path, out: Path, profile: str, as_json: bool) -> None:
    """Write an ONNX model with Q/DQ nodes from a TensorRT calibration cache.

    TensorRT 11 has no calibrators: what it takes is a model with QuantizeLinear and DequantizeLinear nodes. CACHE is
    what an older TensorRT wrote for the same MODEL, or any other table that `klquant convert` reads. Scales of tensors
    that MODEL does not have are left out, and tensors without a scale stay in floating point; both are told.

    \b
    Example:
      klquant cache-to-qdq model.onnx model.cache -o int8.onnx
    """  # noqa: D301
    thresholds = read_thresholds(cache)
    with busy("loading onnxruntime"):
        backend = needed("klquant.backends.onnx", "onnx")
    prepared = backend.prepare(str(model))
    known, observed = _tensors(prepared)
    unknown = [name for name in thresholds if name not in known]
    if len(unknown) == len(thresholds):
        names = f"{_some(unknown)}; the model has {_some(observed)}"
        raise InvalidInputError(
            f"`{cache}` must hold scales of tensors of `{model}`, got none of {len(unknown)}: {names}"
        )
    unscaled = [name for name in observed if name not in thresholds]
    quantized = backend.quantize(prepared, thresholds, profile=profile)
    quantized.save(out)
    if as_json:
        told = {"not_in_model": unknown, "without_scale": unscaled, "skipped": quantized.skipped}
        print_json({"out": out, "profile": profile, "thresholds": quantized.thresholds, **told})
        return
    rows = ((name, number(value), number(value / 127)) for name, value in quantized.thresholds.items())
    print_table(f"{model} for {profile}: in INT8", ("tensor", "T", "scale"), rows)
    print_table("left in floating point", ("name", "why"), quantized.skipped.items())
    click.echo(f"{len(unknown)} of {len(thresholds)} names of {cache} are not in the model{_listed(unknown)}")
    click.echo(f"{len(unscaled)} of {len(observed)} tensors to quantize have no scale{_listed(unscaled)}")
    click.echo(f"wrote {out}")


def _tensors(prepared: Any) -> tuple[set[str], list[str]]:
    """Return the names of all tensors of a model, and those that may be quantized."""
    from klquant.backends.onnx.graph import read_graph
    from klquant.backends.onnx.operators import observed_tensors

    graph = read_graph(prepared)
    return {*graph.inputs, *graph.producers, *graph.initializers}, observed_tensors(graph)


def _listed(names: Sequence[str]) -> str:
    return f": {_some(names)}" if names else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
