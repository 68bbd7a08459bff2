"""What each quantizer of a model costs in the model's own outputs, as a table."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from ...calibration import Calibration
from ...html_tables import html_table
from ...reprs import counted, worst
from ...settings import Engine
from ...text import number, without_nan
from ..correction.data import leading_samples, read_feeds
from ..model.preparation import Prepared, prepare
from ..placement import place
from ..quantization import quantize
from .sensitivity import quantizer_costs

SAMPLES = 4  # of the data


class QuantizerCost(NamedTuple):
    """What one quantizer costs."""

    name: str
    """Of the activation, or of the node whose weight is quantized."""
    sqnr_db: float
    """Of the model's outputs if only this one rounds; the lower, the more harmful it is."""


class Sensitivity(NamedTuple):
    """The result of :func:`sensitivity`."""

    costs: list[QuantizerCost]
    """The most harmful first."""
    expected_sqnr_db: float
    """Of the whole quantized model, if the errors add up like independent noise."""

    def as_json(self) -> str:
        """Return everything as JSON, with null for infinity."""
        return json.dumps(without_nan(self), indent=2, allow_nan=False)

    def __repr__(self) -> str:
        """Return the result in one line."""
        alone = worst((one.name, one.sqnr_db) for one in self.costs)
        together = number(self.expected_sqnr_db, ".1f")
        return f"Sensitivity({counted(len(self.costs), 'quantizer')}, {together} dB expected of all together{alone})"

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        expected = number(self.expected_sqnr_db, ".1f")
        caption = f"SQNR of the outputs in dB, the most harmful first; {expected} dB expected of all together"
        return html_table(caption, ("name", "SQNR dB"), [(one.name, number(one.sqnr_db, ".1f")) for one in self.costs])


def sensitivity(
    model: onnx.ModelProto | str | Path | Prepared,
    calibration: Calibration,
    batches: Iterable[Any],
    *,
    engine: Engine = "tensorrt",
) -> Sensitivity:
    """Rank the quantizers of a model by the noise that each causes alone in the model's outputs.

    Parameters
    ----------
    model : onnx.ModelProto, path or Prepared
        A float model.
    calibration : Calibration
        From :func:`calibrate` on this model.
    batches : iterable
        Data in any form that :func:`calibrate` takes. Only the first 4 samples are used, or the first 4 batches where
        the model fixes their size.
    engine : {"tensorrt", "onnxruntime", "openvino"}
        Whose quantizers to measure.

    Returns
    -------
    Sensitivity

    Raises
    ------
    InvalidInputError
        As for :func:`quantize`, for batches that do not fit, and no batches.

    Notes
    -----
    Cost: one run of the model for each quantizer, and one more. All of them take one session, in which an input of the
    graph selects the only quantizer that rounds. Noise is relative to each channel of an output, and before a final
    softmax or sigmoid.
    """
    prepared = prepare(model)
    quantized = quantize(prepared, calibration, engine=engine).model
    feeds = leading_samples(prepared, read_feeds(prepared, batches), SAMPLES)
    costs = quantizer_costs(place(prepared, calibration, engine).prepared.graph, quantized, feeds)
    found = [QuantizerCost(name, _decibels(cost)) for name, cost in costs.items()]
    return Sensitivity(sorted(found, key=lambda one: one.sqnr_db), _decibels(sum(costs.values())))


def _decibels(noise: float) -> float:
    return -10 * math.log10(noise) if noise else math.inf
