"""``klquant inspect``: which nodes really run in INT8."""

from pathlib import Path
from typing import Any

import click

from klquant.backends.settings import ENGINES, WEIGHTED

from ..data import SOURCE, first_batch
from ..group import needed
from ..images import ImageOptions, image_options
from ..options import ONNX_MODEL, Choice, json_option
from ..output import busy, print_json, print_table


@click.command()
@click.argument("model", type=ONNX_MODEL)
@click.option("--engine", type=Choice(ENGINES), required=True, help="Engine to check.")
@click.option(
    "--data", metavar=SOURCE, help="Also run the engine on the first batch and compare it with MODEL as written."
)
@image_options
@json_option
@click.pass_context
def inspect(ctx: click.Context, /, model: Path, engine: str, data: str | None, as_json: bool, **images: Any) -> None:
    """Show which nodes of an ONNX model an engine runs in INT8.

    onnxruntime and OpenVINO compile MODEL, and klquant examines the compiled graph. TensorRT needs a GPU, so klquant
    checks MODEL against TensorRT's rules for explicit quantization instead.

    The exit code is 0 if every Conv, ConvTranspose, Gemm and MatMul runs in INT8, 1 if any does not, 2 for errors. With
    --data (as for `klquant calibrate`) it is also 1 if the results of the engine differ from those of MODEL.

    \b
    Example:
      klquant inspect int8.onnx --engine onnxruntime
      klquant inspect int8.onnx --engine tensorrt --json || echo "not all INT8"
    """  # noqa: D301
    with busy(f"loading {engine}"):
        backend = needed("klquant.backends.onnx", "onnx")
        nodes = backend.inspect(str(model), engine)
    weighted = [node for node in nodes if node.op_type in WEIGHTED]
    num_int8 = sum(node.int8 for node in weighted)
    verification = None
    if data is not None:
        loaded = needed("onnx", "onnx").load(str(model), load_external_data=False)
        batches = first_batch(data, loaded, ImageOptions(**images))
        verification = backend.verify(str(model), batches, engine)
    if as_json:
        summary = {"engine": engine, "weighted": len(weighted), "weighted_int8": num_int8}
        verified = verification and {
            "result": str(verification),
            "wrong": [row._asdict() for row in verification.wrong],
        }
        print_json({**summary, "nodes": [node._asdict() for node in nodes], "verified": verified})
    else:
        rows = ((node.name, node.op_type, "int8" if node.int8 else "float", node.reason) for node in nodes)
        print_table(f"{model} on {engine}", ("node", "op", "runs in", "why"), rows)
        click.echo(f"{num_int8} of {len(weighted)} {', '.join(WEIGHTED)} in INT8")
        if verification is not None:
            click.echo(str(verification))
    if num_int8 < len(weighted) or (verification is not None and verification.wrong):
        ctx.exit(1)
