"""Detection of thresholds that clip too much. It uses numbers alone and no framework."""

import math
from collections.abc import Mapping
from typing import NamedTuple

MIN_RATIO = 0.5  # of T / amax
MAX_CLIPPED = 1e-3
MOST = 0.5  # of the values: a T that clips more is not the end of a tail but a failed search
MAX_LOSS_DB = 3.0
"""How far the expected SQNR may be below that of another criterion.

On 12 trained models in onnxruntime (text, faces, orientation, captchas) the mean output SQNR is 18.4 dB without the
guard, 19.7 dB with mse everywhere, and 20.2, 20.0, 20.2 and 20.4 dB with a limit of 1, 2, 3 and 5 dB. Text recognizers
read 58, 65, 65, 69 and 40 % of 48 lines as in FP32 (PP-OCRv4), and 80, 75, 83, 83 and 85 % of 40 (PP-OCRv5), with 1, 2,
3, 5 and 10 dB; 4 and 0 % without the guard. A page orientation model falls from 14.1 dB without the guard to 12.8 and
11.0 with 1 and 2 dB, but not with 3 (13.6) and 5 (15.3). On 27 small architectures with random weights a low limit is
best: in the mean they are 6.5 dB below the best criterion without the guard, and 0.5, 0.5, 1.0, 1.7 and 2.2 dB with
1, 2, 3, 5 and 10 dB. So 3 dB.
"""
CROWDED = 0.5  # of the non-zero values in the centre bin: with more, no threshold can resolve them


class Complaint(NamedTuple):
    """What the user should know about the threshold of a layer."""

    text: str = ""
    better: str = ""
    """A criterion that expects less error, if there is one."""
    gain_db: float = 0.0
    """How much more SQNR that one expects."""

    def after(self, text: str) -> "Complaint":
        """Return this complaint with another text before its own."""
        return self._replace(text="; ".join(filter(None, [text, self.text])))


def overclipped(
    *, amax: float, threshold: float, clipped: float, sqnr_db: float, alternatives: Mapping[str, float]
) -> Complaint:
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
    Complaint
        Empty unless ``T < 0.5 amax`` and more than 1e-3 of the values are clipped, or most values are clipped, or the
        expected SQNR is more than 3 dB below that of an alternative. It names the best alternative, if that is better.
    """
    known = {name: decibels for name, decibels in alternatives.items() if not math.isnan(decibels)}
    best = max(known, key=known.__getitem__, default="")
    gap = known.get(best, math.nan) - sqnr_db
    reasons = []
    most = clipped > MOST
    if most or (threshold < MIN_RATIO * amax and clipped > MAX_CLIPPED):
        reasons.append(
            f"T = {threshold:.4g} is {threshold / amax:.2f} of amax = {amax:.4g} and clips {clipped:.2%} of the values"
        )
    if gap > MAX_LOSS_DB:
        reasons.append(f"expected SQNR {sqnr_db:.1f} dB at T = {threshold:.4g}, {gap:.1f} dB below criterion {best!r}")
    if not reasons:
        return Complaint()
    if gap <= 0 and not most:
        return Complaint("; ".join([*reasons, "no other criterion expects a better SQNR here"]))
    if not best:
        reasons.append("criterion 'mse' may be better")
    return Complaint("; ".join(reasons), best, max(gap, 0.0) if best else 0.0)
