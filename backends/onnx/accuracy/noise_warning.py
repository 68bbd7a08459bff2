"""A warning about quantized models whose outputs are mostly noise."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from ...accuracy.padding import unpadded
from ...accuracy.sums import Sums, compare_arrays
from ...text import number
from ...warning import warn
from ..correction.data import first_samples, read_feeds
from ..execution import open_onnxruntime
from ..feeds import Array
from ..model.preparation import Prepared

NOISY_DB = 10.0  # noise of a third of the signal: no detector or classifier that we tried survived it
SAMPLES = 4


def warn_of_noise(exact: Prepared, quantized: onnx.ModelProto, batches: Sequence[Any], *, optimized: bool) -> None:
    """Warn if an output of a quantized model is far from that of the float model, on some samples of the batches."""
    names = exact.graph.outputs
    sums = dict.fromkeys(names, Sums())
    with (
        open_onnxruntime(exact.model, optimized=True) as floats,
        open_onnxruntime(quantized, optimized=optimized) as others,
    ):
        for few in first_samples(exact, list(read_feeds(exact, batches)), SAMPLES):
            expected, found = (unpadded(few, session(names, few)) for session in (floats, others))
            for name in names:
                sums[name] = sums[name].plus(_compared(expected, found, name))
    noisy = {name: one.sqnr_db for name, one in sums.items() if one.sqnr_db < NOISY_DB}
    if noisy:
        listed = ", ".join(f"{number(db, '.1f')} dB at output `{name}`" for name, db in noisy.items())
        warn(
            f"the quantized model is far from the float model: SQNR {listed}; "
            "tune() and `klquant tune` leave the layers that cost most in floating point"
        )


def _compared(expected: Mapping[str, Array], found: Mapping[str, Array], name: str) -> Sums:
    one, other = expected[name], found[name]
    return compare_arrays(one, other) if one.dtype.kind == "f" and one.shape == other.shape else Sums()
