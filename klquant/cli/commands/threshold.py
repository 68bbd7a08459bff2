"""``klquant threshold``: the threshold that each criterion finds in a histogram."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np

import klquant
from klquant.backends.calibration import Calibration
from klquant.backends.settings import MAX_BINS, LayerOptions
from klquant.backends.thresholds import LayerThreshold, candidate_thresholds
from klquant.errors import InvalidInputError

from ..data import load_arrays
from ..options import ARRAYS, CALIBRATION, InputFile, json_option
from ..output import busy, print_json, print_thresholds, threshold_record

Found: TypeAlias = Mapping[str, Mapping[str, LayerThreshold]]  # by criterion and tensor
KEYS = (("hist", "edges"), ("counts", "amax"))


def _complete_tensor(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Return matching tensors of the calibration. click has not parsed its path yet if the option has no value."""
    path = ctx.params["hist"] or next(iter(ctx.args), "")
    try:
        return [name for name in Calibration.load(path).amax if name.startswith(incomplete)]
    except (klquant.KLQuantError, OSError):  # another kind of file, or no file yet
        return []


@click.command()
@click.argument("hist", type=InputFile(ARRAYS, CALIBRATION))
@click.option("--key", nargs=2, metavar="HIST EDGES",
              help="Names of the two arrays; EDGES may be amax.  [default: hist edges, or counts amax]")  # fmt: skip
@click.option("--num-bits", type=click.IntRange(2, 16), help="Bits to quantize to.  [default: 8, or as calibrated]")
@click.option("--tensor", "tensors", multiple=True, shell_complete=_complete_tensor,
              help="Show only this tensor of a calibration; may be repeated.")  # fmt: skip
@json_option
def threshold(
    hist: Path, key: tuple[str, str] | None, num_bits: int | None, tensors: tuple[str, ...], as_json: bool
) -> None:
    """Compare the criteria on a histogram or a calibration.

    HIST is a klquant calibration, or an .npz file with one histogram: `hist` and `edges`, or `counts` and `amax`. The
    number of bins must be odd, and the bins symmetric about 0, as klquant.histogram makes them.

    As in every calibration, the search leaves out the bin around 0. The clipped share refers to all values.

    \b
    Example:
      klquant threshold hist.npz --num-bits 4
      klquant threshold calib.npz --tensor conv1_output --json
    """  # noqa: D301
    with busy("searching"):
        is_calibration = "meta" in _arrays(hist)
        found = _of_calibration(hist, num_bits, tensors) if is_calibration else _of_arrays(hist, key, num_bits, tensors)
    listed = dict.fromkeys((name, by_name[name]) for name in next(iter(found.values())) for by_name in found.values())
    if as_json:
        print_json([threshold_record(*row) for row in listed])
    else:
        print_thresholds(str(hist), listed)


def _arrays(path: Path) -> Mapping[str, Any]:
    content = load_arrays(path)
    if not isinstance(content, Mapping):
        raise InvalidInputError(f"`{path}` must be an .npz file with named arrays of counts and edges, got one array")
    return content


def _of_arrays(path: Path, key: tuple[str, str] | None, num_bits: int | None, tensors: tuple[str, ...]) -> Found:
    arrays = _arrays(path)
    if tensors:
        raise InvalidInputError(
            f"`--tensor` must be left out: `{path}` is not a calibration; choose its arrays with --key"
        )
    pair = key or next((pair for pair in KEYS if set(pair) <= set(arrays)), KEYS[0])
    if missing := [name for name in pair if name not in arrays]:
        raise InvalidInputError(
            f"`{path}` must contain the arrays {' and '.join(pair)}, got {sorted(arrays)} without {missing}"
        )
    hist, edges = (arrays[name] for name in pair)
    if hist.ndim != 1 or hist.size > MAX_BINS:
        raise InvalidInputError(f"`{pair[0]}` of `{path}` must have shape (n,) with n <= {MAX_BINS}, got {hist.shape}")
    if edges.size == 1:
        edges = klquant.histogram(np.zeros(0), num_bins=hist.size, amax=float(edges.item())).edges
    histogram = klquant.Histogram(hist, edges)
    amax = float(klquant.max_threshold(*histogram))
    name, options = pair[0], LayerOptions(num_bits=num_bits)
    found: Found = candidate_thresholds({name: amax}, {name: histogram}, {name: options})
    return found


def _of_calibration(path: Path, num_bits: int | None, tensors: tuple[str, ...]) -> Found:
    calibration = Calibration.load(path)
    if unknown := [name for name in tensors if name not in calibration.amax]:
        close = get_close_matches(unknown[0], calibration.amax, n=3, cutoff=0.0)
        raise InvalidInputError(
            f"`--tensor` must name tensors of `{path}`, got {unknown}; similar to the first: {close}"
        )
    amax = {name: calibration.amax[name] for name in tensors or calibration.amax}
    resolved = calibration.settings.with_bits(num_bits).resolve(amax)
    options = {name: chosen._replace(criterion=None, threshold=None) for name, chosen in resolved.items()}
    found: Found = candidate_thresholds(amax, calibration.histograms, options)
    return found
