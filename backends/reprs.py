"""Results in one line."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NoReturn

from klquant.errors import ArrayTypeError

from .text import number, percent
from .thresholds import LayerThreshold


def counted(number_of: int, what: str) -> str:
    """Return a number with a noun, such as ``3 layers``."""
    return f"{number_of} {what}{'' if number_of == 1 else 's'}"


def criteria(thresholds: Mapping[str, LayerThreshold]) -> str:
    """Return how many thresholds each criterion chose, such as ``entropy 3, mse 1``."""
    found = Counter(layer.criterion for layer in thresholds.values())
    return ", ".join(f"{name} {times}" for name, times in found.most_common())


def left_out(skipped: Mapping[str, str]) -> str:
    """Return how much stays in floating point, or nothing."""
    return f", {len(skipped)} in floating point" if skipped else ""


def threshold_in_brief(layer: LayerThreshold) -> str:
    """Return the numbers of one threshold."""
    numbers = f"T={number(layer.threshold)} of amax={number(layer.amax)}"
    return f"{numbers}, {layer.how}, clipped={percent(layer.clipped)}, {number(layer.sqnr_db, '.1f')} dB"


def worst(pairs: Iterable[tuple[str, float]]) -> str:
    """Return the name with the least number, such as ``, worst conv1 at 20.3 dB``; nothing without names."""
    known = [(value, name) for name, value in pairs if value == value]  # noqa: PLR0124 NaN is missing
    return f", worst {min(known)[1]} at {number(min(known)[0], '.1f')} dB" if known else ""


def refuse_call(result: object) -> NoReturn:
    """Raise ArrayTypeError: it is the model of a result that can be called."""
    raise ArrayTypeError(f"a {type(result).__name__} cannot be called; call its `.model`")
