"""Detection of thresholds that clip too much. It uses numbers alone and no framework."""

import math
from collections.abc import Mapping
from typing import NamedTuple

MIN_RATIO = 0.5  # of T / amax
MAX_CLIPPED = 1e-3
MOST = 0.5  # of the values: a T that clips more is not the end of a tail but a failed search
MAX_LOSS_DB = 2.0
"""How far the expected SQNR may be below that of another criterion.

Below the best criterion for the whole model, 27 small architectures with random weights have, in the mean, 6.5 dB
without the guard, and 0.5, 0.5, 1.0, 1.7 and 2.2 dB with a limit of 1, 2, 3, 5 and 10 dB. On 12 trained models in
onnxruntime (text, faces, orientation, captchas) the mean output SQNR is 18.4 dB without the guard, 19.7 dB with mse
everywhere, and 20.2, 20.0, 20.2 and 20.4 dB with 1, 2, 3 and 5 dB. A text recognizer reads 58, 65, 65, 69 and 40 % of
48 lines as in FP32 with 1, 2, 3, 5 and 10 dB; 4 % without the guard and 60 % with mse. So up to 5 dB serves trained
models equally, and the fewest losses elsewhere decide.
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
        expected SQNR is more than 2 dB below that of an alternative. It names the best alternative, if that is better.
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
    reasons.append(f"pass criterion={best or 'mse'!r} for this layer")
    return Complaint("; ".join(reasons), best, max(gap, 0.0) if best else 0.0)
