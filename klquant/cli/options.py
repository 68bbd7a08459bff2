"""Options that several commands have, and the types of their values."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias, get_args

import click

from klquant.backends.settings import Criterion

from .kinds import CACHE, CALIBRATION, MODEL, InputFile

Decorator: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
PROFILES = ("tensorrt", "onnxruntime", "openvino")
EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW = click.Path(dir_okay=False, path_type=Path)
ONNX_MODEL, SAVED_CALIBRATION, TABLE = InputFile(MODEL), InputFile(CALIBRATION), InputFile(CACHE, CALIBRATION)


def parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Turn `224x320` or `224` into (height, width)."""
    if value is None:
        return None
    height, _, width = value.lower().partition("x")
    if not all(side.isdecimal() and int(side) for side in (height, width or height)):
        raise click.BadParameter(f"expected HEIGHTxWIDTH such as 224x224, got {value!r}")
    return int(height), int(width or height)


def parse_numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    """Turn `0.5` or `0.4,0.5,0.6` into numbers: one for all channels, or one for each of three."""
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3) or not all(math.isfinite(number) for number in numbers):
        raise click.BadParameter(f"expected one number or three with commas between, got {value!r}")
    return numbers


def parse_overrides(ctx: click.Context, param: click.Parameter, value: Iterable[str]) -> dict[str, Any]:
    """Turn each `PATTERN=CRITERION` into an override of the settings; the last `=` counts, names may hold others."""
    overrides: dict[str, Any] = {}
    for text in value:
        pattern, _, criterion = text.rpartition("=")
        if not pattern or criterion not in CRITERIA:
            raise click.BadParameter(f"expected PATTERN=CRITERION with one of {', '.join(CRITERIA)}, got {text!r}")
        overrides.pop(pattern, None)
        overrides[pattern] = {"criterion": criterion}
    return overrides


def criterion_option(default: Criterion | None, what: str) -> Decorator:
    """Let one of the criteria be chosen."""
    return click.option("--criterion", type=click.Choice(CRITERIA), default=default, show_default=True, help=what)


override_option = click.option(
    "--override", "overrides", multiple=True, metavar="PATTERN=CRITERION", callback=parse_overrides,
    help="Another criterion for the tensors that match; may be repeated, the last one wins.",
)  # fmt: skip
profile_option = click.option(
    "--profile", type=click.Choice(PROFILES), default="tensorrt", show_default=True,
    help="Where Q/DQ nodes stand: as this engine wants them.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout and nothing else.")
