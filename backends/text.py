"""Results as text: numbers, table cells of thresholds, and values for JSON."""

import math
from collections.abc import Mapping
from typing import Any

from .thresholds import LayerThreshold

MISSING = "\N{EN DASH}"
THRESHOLD_COLUMNS = ("criterion", "amax", "T", "T/amax", "clipped", "KL nats", "SQNR dB")


def number(value: float | None, form: str = ".4g", missing: str = MISSING) -> str:
    """Return a number as text, and `missing` for None and NaN."""
    if value is None or math.isnan(value):
        return missing
    return format(value, form) if math.isfinite(value) else "\N{INFINITY}" if value > 0 else "-\N{INFINITY}"


def milliseconds(value: float) -> str:
    """Return a time in milliseconds, without an exponent."""
    return number(value, ".0f" if value >= 1000 else ".3g")


def percent(share: float | None, missing: str = MISSING) -> str:
    """Return a share in percent."""
    return missing if share is None or math.isnan(share) else f"{100 * share:.3g}%"


def ratio(found: LayerThreshold) -> float:
    """Return T / amax, and NaN for a tensor that is always 0."""
    return found.threshold / found.amax if found.amax else math.nan


def threshold_cells(found: LayerThreshold, missing: str = MISSING) -> dict[str, str]:
    """Return the cells of `THRESHOLD_COLUMNS` by column."""
    cells = (
        found.how,
        number(found.amax),
        number(found.threshold),
        number(ratio(found), ".3f", missing),
        percent(found.clipped, missing),
        number(found.divergence, ".3g", missing),
        number(found.sqnr_db, ".1f", missing),
    )
    return dict(zip(THRESHOLD_COLUMNS, cells, strict=True))


def without_nan(value: Any) -> Any:
    """Return a value as JSON can hold it: dicts for NamedTuples, null for NaN and infinity."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
