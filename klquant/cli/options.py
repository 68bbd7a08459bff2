"""Types and options that commands share, and the thresholds of a saved calibration."""

import math
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import click

from klquant.backends.calibration import Calibration
from klquant.backends.collection.kept import KEEP_BYTES
from klquant.backends.plugins import Kind, installed
from klquant.backends.settings import CRITERIA, ENGINES, Criterion, Settings, did_you_mean, matching

from .output import busy

MODEL, CALIBRATION, ARRAYS = "an ONNX model", "a klquant calibration", "a NumPy file"
CACHE, PYTORCH = "a TensorRT calibration cache", "a PyTorch file"


class InputFile(click.Path):
    """An existing file. A file that is clearly of another kind is rejected before anything is loaded."""

    def __init__(self, *kinds: str) -> None:
        super().__init__(exists=True, dir_okay=False, path_type=Path)
        self._kinds = kinds

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path of the file."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        found = kind_of(path)
        if found and found not in self._kinds:
            self.fail(f"expected {' or '.join(self._kinds)}, got `{path}`: {found}", param, ctx)
        return path


def kind_of(path: Path) -> str:
    """Return the kind of a file by its first bytes; empty if they do not identify it."""
    names = _names_in_zip(path)
    if names:
        return PYTORCH if "data.pkl" in names else CALIBRATION if "meta.npy" in names else ARRAYS
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(b"\x93NUMPY"):
        return ARRAYS
    if start.startswith(b"TRT-"):
        return CACHE
    return MODEL if path.suffix == ".onnx" else ""


def _names_in_zip(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as content:
            return {Path(name).name for name in content.namelist()}
    except zipfile.BadZipFile:
        return set()


Decorator: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]
EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW = click.Path(dir_okay=False, path_type=Path)
ONNX_MODEL, SAVED_CALIBRATION, TABLE = InputFile(MODEL), InputFile(CALIBRATION), InputFile(CACHE, CALIBRATION)


def parse_size(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Parse `224x320` or `224` as (height, width)."""
    if value is None:
        return None
    height, _, width = value.lower().partition("x")
    if not all(side.isdecimal() and int(side) for side in (height, width or height)):
        raise click.BadParameter(f"expected HEIGHTxWIDTH such as 224x224, got {value!r}")
    return int(height), int(width or height)


def parse_numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    """Parse `0.5` or `0.4,0.5,0.6`: one number for all channels, or one for each of three."""
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (1, 3) or not all(math.isfinite(number) for number in numbers):
        raise click.BadParameter(f"expected one number or three separated by commas, got {value!r}")
    return numbers


def parse_overrides(ctx: click.Context, param: click.Parameter, value: Iterable[str]) -> dict[str, Any]:
    """Parse each `PATTERN=CRITERION` or `PATTERN=T`. Names may contain `=`, so the last one separates."""
    overrides: dict[str, Any] = {}
    for text in value:
        pattern, _, how = text.rpartition("=")
        threshold = _positive(how)
        known = how in CRITERIA or threshold is not None or how in installed("criteria")
        if not pattern or not known:
            expected = f"PATTERN=CRITERION with one of {', '.join(CRITERIA)}, or PATTERN=T with a threshold"
            raise click.BadParameter(f"expected {expected}, got {text!r}{did_you_mean(how, CRITERIA)}")
        overrides.pop(pattern, None)
        overrides[pattern] = {"criterion": how} if threshold is None else {"threshold": threshold}
    return overrides


def _positive(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


def batch_size_option(default: int) -> Decorator:
    """Return ``--batch-size``; `default` holds where the model fixes no batch size."""
    return click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        metavar="N",
        help=f"Samples per batch.  [default: as fixed in the model, or {default}; one file of a folder]",
    )


def max_samples_option(default: int | None) -> Decorator:
    """Return ``--max-samples``."""
    return click.option(
        "--max-samples", type=click.IntRange(min=1), default=default, metavar="N", show_default=default is not None,
        help="Use at most this many samples, evenly spaced.",
    )  # fmt: skip


class Choice(click.Choice[str]):
    """A choice that names the nearest one, by the names of other tools as well; other packages may add to it."""

    def __init__(self, choices: Iterable[str], kind: Kind | None = None) -> None:
        super().__init__(list(choices))
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the choice, or fail with all of them."""
        names = [str(name) for name in self.choices]
        if value not in names and self._kind is not None:
            names += installed(self._kind)
        if value not in names:
            self.fail(f"expected one of {', '.join(names)}, got {value!r}{did_you_mean(value, names)}", param, ctx)
        return str(value)


def criterion_option(default: Criterion | None, what: str, *, others: Iterable[str] = ()) -> Decorator:
    """Return the option `--criterion`."""
    return click.option(
        "--criterion", type=Choice([*CRITERIA, *others], "criteria"), default=default, show_default=True, help=what
    )


override_option = click.option(
    "--override", "overrides", multiple=True, metavar="PATTERN=CRITERION", callback=parse_overrides,
    help="Criterion for matching tensors, or T itself; may be repeated, the last match wins.",
)  # fmt: skip
keep_bytes_option = click.option(
    "--keep-bytes", type=click.IntRange(min=0), default=KEEP_BYTES, metavar="N", show_default=True,
    help="Memory for tensors of the first run, so that the second one is not needed for them.",
)  # fmt: skip

guard_option = click.option(
    "--guard/--no-guard", default=None,
    help="Take the better of mse and max where entropy clips too much; --no-guard is the literal algorithm.  "
    "[default: guard, or as calibrated]",
)  # fmt: skip
engine_option = click.option(
    "--engine", type=Choice(ENGINES), default="tensorrt", show_default=True,
    help="Place the Q/DQ nodes for this engine.",
)  # fmt: skip
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def load_calibration(
    path: Path,
    *,
    criterion: Criterion | None = None,
    overrides: Mapping[str, Any] | None = None,
    guard: bool | None = None,
) -> Calibration:
    """Load a calibration and search the thresholds again where the options ask for it.

    With a `criterion`, all tensors are searched again; those with an override keep theirs. Without one, only tensors
    that match `overrides` are searched, and without `guard` those that it changed; or all if the calibration has no
    thresholds yet.
    """
    calibration, overrides = Calibration.load(path), overrides or {}
    Settings.make(overrides=overrides).check_patterns(calibration.amax)
    settings = Settings.make(
        **{**calibration.settings._asdict(), "overrides": {**calibration.settings.overrides, **overrides}}
    )
    settings = settings._replace(guard=settings.guard if guard is None else guard)
    named = matching(calibration.amax, overrides)
    if guard is False:
        named |= {name for name, found in calibration.thresholds.items() if found.replaced}
    again = {
        name: amax
        for name, amax in calibration.amax.items()
        if criterion or not calibration.thresholds or name in named
    }
    searching = calibration._replace(settings=settings, amax=again)
    with busy("searching"):
        found = searching.search_thresholds(criterion=criterion or "entropy")
    return calibration._replace(settings=settings, thresholds={**calibration.thresholds, **found})
