"""Detection of thresholds that clip too much. It uses numbers alone and no framework."""

import math
from collections.abc import Mapping

MIN_RATIO = 0.5  # of T / amax
MAX_CLIPPED = 1e-3
MAX_LOSS_DB = 3.0
CROWDED = 0.5  # of the non-zero values in the centre bin: with more, no threshold can resolve them


def overclipped(
    *, amax: float, threshold: float, clipped: float, sqnr_db: float, alternatives: Mapping[str, float]
) -> str:
    """Describe how a threshold clips too much, and the remedy.

    Parameters
    ----------
    amax, threshold : float
        Largest absolute value observed, and the threshold T, in units of the activation.
    clipped : float
        Share of all values beyond T.
    sqnr_db : float
        Expected signal-to-quantization-noise ratio at T, in dB; NaN if unknown.
    alternatives : mapping
        Expected SQNR in dB of other criteria on the same histogram, above all ``max`` and ``mse``.

    Returns
    -------
    str
        Empty unless ``T < 0.5 amax`` and more than 1e-3 of the values are clipped, or the expected SQNR is more than
        3 dB below that of an alternative.
    """
    known = {name: decibels for name, decibels in alternatives.items() if not math.isnan(decibels)}
    best = max(known, key=known.__getitem__, default="")
    gap = known.get(best, math.nan) - sqnr_db
    reasons = []
    if threshold < MIN_RATIO * amax and clipped > MAX_CLIPPED:
        reasons.append(
            f"T = {threshold:.4g} is {threshold / amax:.2f} of amax = {amax:.4g} and clips {clipped:.2%} of the values"
        )
    if gap > MAX_LOSS_DB:
        reasons.append(f"expected SQNR {sqnr_db:.1f} dB at T = {threshold:.4g}, {gap:.1f} dB below criterion {best!r}")
    if not reasons:
        return ""
    if gap <= 0:
        reasons.append("no other criterion expects a better SQNR here")
    else:
        reasons.append(f"pass criterion={best or 'mse'!r} for this layer")
    return "; ".join(reasons)
