"""The results of a calibration, in one file: thresholds can be searched again from it without data."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import klquant
from klquant.errors import InvalidInputError

from .calibration_checks import (
    check_chosen,
    check_floats,
    check_names,
    check_number,
    check_positives,
    check_ranges,
    check_replaced,
    check_text,
    check_texts,
    check_transforms,
    read_histogram,
)
from .html_tables import html_skipped, html_table, html_thresholds
from .npz import load_npz, save_npz
from .observed import Hidden
from .reprs import counted, criteria, left_out
from .settings import Criterion, Settings
from .text import number
from .thresholds import LayerThreshold, search_thresholds

SCHEMA = 1
_KIND = "calibration"
_NUMBERS = ("amax", "threshold", "divergence", "clipped", "sqnr_db")


class Fingerprint(NamedTuple):
    """Identifies a layer of a model with its weights."""

    kind: str
    """Class, shapes and dtypes."""
    digest: str
    """SHA-256 over its parameters and buffers."""


class Calibration(NamedTuple):
    """Everything that was found about a model on its calibration data."""

    settings: Settings
    model: dict[str, Fingerprint]
    """The fingerprint of every layer with parameters, by qualified name."""
    amax: dict[str, float]
    """Largest absolute value of every observed tensor."""
    histograms: dict[str, klquant.Histogram]
    """Zeros included; tensors that are always 0 have none."""
    thresholds: dict[str, LayerThreshold]
    """Of the last search; empty before the first."""
    calls: dict[str, int]
    """How often the model called each layer in one batch; the statistics of all calls are joined."""
    num_batches: int
    """Of all processes together."""
    transforms: dict[str, list[dict[str, Any]]]
    """How the model was changed before it was observed, and what was left alone and why, by stage."""
    skipped: dict[str, str]
    """Layers that stay in floating point, and why."""
    weight_scales: Mapping[str, list[float]] = {}
    """Of each output channel of the weights, by layer; 0 marks a dead channel."""
    versions: Mapping[str, str] = {}
    """Of klquant and NumPy that wrote the file, if this was loaded."""
    ranges: Mapping[str, tuple[float, float]] = {}
    """Smallest and largest value of every observed tensor; empty if loaded from an older file."""
    zeros: Mapping[str, int] = {}
    """How many values of each tensor are exactly 0, if that is known."""
    beyond: Mapping[str, int] = {}
    """How many values lie beyond the histogram of a tensor, which counts them in its end bins."""

    @classmethod
    def of(cls, settings: Settings) -> "Calibration":
        """Return an empty calibration."""
        return cls(settings, {}, {}, {}, {}, {}, 0, {}, {})

    def search_thresholds(
        self, *, criterion: Criterion = "entropy", num_bits: int | None = None, guard: bool | None = None
    ) -> dict[str, LayerThreshold]:
        """Choose T for every tensor; see :func:`klquant.backends.thresholds.search_thresholds`.

        `num_bits` and `guard` are by default those of the settings.
        """
        options = self.settings.with_bits(num_bits).resolve(self.amax)
        return search_thresholds(
            self.amax,
            self.histograms,
            criterion=criterion,
            options=options,
            hidden=self.hidden,
            guard=self.settings.guard if guard is None else guard,
        )

    @property
    def hidden(self) -> dict[str, Hidden]:
        """Return what the histograms do not show, for :func:`klquant.backends.thresholds.search_thresholds`."""
        cap = self.settings.max_amax or math.inf
        return {name: Hidden(self.zeros.get(name), self.beyond.get(name, 0), cap) for name in self.amax}

    def __repr__(self) -> str:
        """Return the result in one line."""
        found = criteria(self.thresholds) or "no thresholds yet"
        data = f"{counted(len(self.amax), 'tensor')}, {self.num_batches} batches"
        return f"Calibration({data}, {found}{left_out(self.skipped)})"

    def _repr_html_(self) -> str:
        """Return a table for notebooks: of the thresholds, or of the ranges before the first search."""
        caption = f"Calibration: {len(self.amax)} tensors, {self.num_batches} batches"
        if self.thresholds:
            return html_thresholds(caption, "tensor", self.thresholds) + html_skipped(self.skipped)
        observed = [(name, number(amax)) for name, amax in self.amax.items()]
        return html_table(f"{caption}, no thresholds yet", ("tensor", "amax"), observed) + html_skipped(self.skipped)

    def check_fits(self, model: Mapping[str, Fingerprint]) -> None:
        """Raise InvalidInputError, naming the layers, if this calibration is of another model."""
        differing = [f"`{name}` is only in the calibration" for name in self.model if name not in model]
        differing += [f"`{name}` is only in the model" for name in model if name not in self.model]
        for name in self.model.keys() & model.keys():
            ours, theirs = self.model[name], model[name]
            if ours.kind != theirs.kind:
                differing.append(f"`{name}` is {theirs.kind}, was calibrated as {ours.kind}")
            elif ours.digest != theirs.digest:
                differing.append(f"`{name}` has other weights")
        if differing:
            shown = "; ".join(sorted(differing)[:10]) + ("; ..." if len(differing) > 10 else "")
            raise InvalidInputError(
                f"the calibration must belong to this model, got {len(differing)} differing layers: {shown}"
            )

    def save(self, path: str | Path) -> None:
        """Write everything to one npz file; if that fails, a file of that name stays as it was."""
        names = list(self.amax)
        replaced = {name: found for name, found in self.thresholds.items() if found.replaced}
        meta = {
            "versions": {"klquant": klquant.__version__, "numpy": np.__version__},
            "settings": self.settings.as_json(),
            "model": self.model,
            "layers": names,
            "calls": self.calls,
            "num_batches": self.num_batches,
            "transforms": self.transforms,
            "skipped": self.skipped,
            "weights": list(self.weight_scales),
            "zeros": self.zeros,
            "beyond": self.beyond,
            "chosen": {name: (found.criterion, found.num_bits) for name, found in self.thresholds.items()},
            "replaced": {name: found.replaced for name, found in replaced.items()},
            "guarded": [name for name, found in self.thresholds.items() if found.guarded],
        }
        rows = [[getattr(found, field) for field in _NUMBERS] for found in self.thresholds.values()]
        arrays = {f"hist_{k}": self.histograms[name].hist for k, name in enumerate(names) if name in self.histograms}
        arrays |= {f"weights_{k}": np.array(scales, np.float64) for k, scales in enumerate(self.weight_scales.values())}
        arrays["range"] = np.array([_range_of(self.histograms.get(name)) for name in names], np.float64)
        if self.ranges:
            arrays["low_high"] = np.array([self.ranges[name] for name in names], np.float64)
        arrays["amax"] = np.array([self.amax[name] for name in names], np.float64)
        arrays["thresholds"] = np.array(rows, np.float64).reshape(len(rows), len(_NUMBERS))
        if replaced:
            arrays["gain_db"] = np.array([found.gain_db for found in replaced.values()], np.float64)
        save_npz(Path(path), _KIND, SCHEMA, meta, arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read a file that :meth:`save` wrote.

        Raises
        ------
        InvalidInputError
            For a damaged or foreign file. A missing one is a FileNotFoundError.
        """
        meta, arrays = load_npz(Path(path), _KIND, SCHEMA)
        try:
            return _read(meta, arrays)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InvalidInputError(
                f"`{path}` must be a klquant calibration file, got a damaged one: {error}"
            ) from error


def checked(calibration: object) -> Calibration:
    """Raise InvalidInputError for anything but a Calibration, such as its path."""
    if not isinstance(calibration, Calibration):
        given = type(calibration).__name__
        raise InvalidInputError(f"expected a Calibration, got {given}; Calibration.load(path) reads a file")
    return calibration


def _read(meta: dict[str, Any], arrays: Mapping[str, "np.ndarray[Any, Any]"]) -> Calibration:
    names, weights = check_names(meta["layers"]), check_names(meta.get("weights", []))
    amax, ranges = (check_positives(arrays[key], (len(names),)) for key in ("amax", "range"))
    rows = check_floats(arrays["thresholds"], (len(meta["chosen"]), len(_NUMBERS)))
    chosen = zip(meta["chosen"].items(), rows.tolist(), strict=True)
    replaced = check_replaced(meta.get("replaced", {}), arrays.get("gain_db"), meta["chosen"])
    guarded = set(check_names(meta.get("guarded", [])))
    return Calibration(
        settings=Settings.make(**meta["settings"]),
        model={check_text(name): Fingerprint(*map(check_text, layer)) for name, layer in meta["model"].items()},
        amax=dict(zip(names, amax, strict=True)),
        histograms={
            name: read_histogram(arrays[f"hist_{k}"], ranges[k])
            for k, name in enumerate(names)
            if f"hist_{k}" in arrays
        },
        thresholds={
            check_text(name): _threshold(row, how, replaced.get(name, ()))._replace(guarded=name in guarded)
            for (name, how), row in chosen
        },
        calls=_numbers(meta["calls"]),
        num_batches=check_number(meta["num_batches"]),
        transforms=check_transforms(meta["transforms"]),
        skipped=check_texts(meta["skipped"]),
        weight_scales={name: check_positives(arrays[f"weights_{k}"], (-1,)) for k, name in enumerate(weights)},
        versions=check_texts(meta["versions"]),
        zeros=_numbers(meta.get("zeros", {})),
        beyond=_numbers(meta.get("beyond", {})),
        ranges=_ranges(arrays, names),
    )


def _numbers(given: Mapping[str, Any]) -> dict[str, int]:
    return {check_text(name): check_number(number) for name, number in given.items()}


def _ranges(arrays: Mapping[str, "np.ndarray[Any, Any]"], names: list[str]) -> dict[str, tuple[float, float]]:
    if "low_high" not in arrays:
        return {}
    return dict(zip(names, check_ranges(arrays["low_high"], len(names)), strict=True))


def _threshold(row: list[Any], how: Any, replaced: Any) -> LayerThreshold:
    chosen: Any = check_chosen(*how)
    found = LayerThreshold(*row, *chosen, *replaced)
    if not (0 <= found.amax < math.inf and 0 < found.threshold < math.inf):
        raise ValueError(f"T and amax must be positive and finite, got {found}")
    return found


def _range_of(histogram: klquant.Histogram | None) -> float:
    return 0.0 if histogram is None else float(histogram.edges[-1])
