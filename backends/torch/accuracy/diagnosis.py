"""Diagnose where a quantized model loses accuracy: in weights, activations or outputs, and in which layer."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from klquant.errors import InvalidInputError

from ...batches import progress_bar
from ...html_tables import html_table
from ...reprs import counted, worst
from ...text import number, without_nan
from ...thresholds import LayerThreshold
from ..model.dataflow import tensors_in
from ..model.forward import Forward, Where, call_model, check_eval
from .measurement import NOTHING, LayerSums, Measurements, Run

TRIED_SAMPLES = 64  # on which layers are quantized one at a time


class LayerDiagnosis(NamedTuple):
    """What INT8 does to one layer, and what this layer does to the model. SQNR is in dB."""

    name: str
    weight_sqnr_db: float
    """The weights against their INT8 form."""
    activation_sqnr_db: float
    """The observed tensor against its INT8 form at T, with nothing else quantized, on the data."""
    output_cosine: float
    """The layer's output in the float model against that in the simulation, errors of earlier layers included."""
    output_sqnr_db: float
    alone_sqnr_db: float
    """The model's output if only this layer is quantized. The lower, the more harmful is the layer."""
    without_sqnr_db: float
    """The model's output if all layers but this one are quantized. The higher, the more it gains in float."""
    note: str = ""
    """Why numbers are missing (NaN)."""


class Diagnosis(NamedTuple):
    """The result of :func:`diagnose`."""

    layers: list[LayerDiagnosis]
    """The most harmful first."""
    model_sqnr_db: float
    """The model's output with all layers quantized."""
    model_cosine: float

    def as_json(self) -> str:
        """Return everything as JSON, with null for NaN and infinity."""
        content = {"model_sqnr_db": self.model_sqnr_db, "model_cosine": self.model_cosine, "layers": self.layers}
        return json.dumps(without_nan(content), indent=2, allow_nan=False)

    def __repr__(self) -> str:
        """Return the result in one line."""
        alone = worst((layer.name, layer.alone_sqnr_db) for layer in self.layers)
        return f"Diagnosis({counted(len(self.layers), 'layer')}, output {number(self.model_sqnr_db, '.1f')} dB{alone})"

    def _repr_html_(self) -> str:
        """Return a table of the layers for notebooks."""
        caption = f"SQNR in dB, the most harmful layer first; {number(self.model_sqnr_db, '.1f')} dB with all of them"
        numbers = ("weight_sqnr_db", "activation_sqnr_db", "output_sqnr_db", "alone_sqnr_db", "without_sqnr_db")
        rows = [
            (layer.name, *(number(getattr(layer, name), ".1f") for name in numbers), layer.note)
            for layer in self.layers
        ]
        return html_table(caption, ("layer", "weights", "activation", "output", "alone", "without", "note"), rows)

    @classmethod
    def from_json(cls, text: str) -> "Diagnosis":
        """Read what :meth:`as_json` wrote, with NaN for null."""
        try:
            content = json.loads(text)
            rows: list[dict[str, Any]] = content.pop("layers")
            layers = [LayerDiagnosis(**{key: _nan_if_null(value) for key, value in row.items()}) for row in rows]
            return cls(layers, **{key: _nan_if_null(value) for key, value in content.items()})
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InvalidInputError(f"`text` must be what Diagnosis.as_json wrote, got: {error}") from error


def diagnose(
    model: nn.Module,
    weight_scales: Mapping[str, torch.Tensor],
    thresholds: Mapping[str, LayerThreshold],
    batches: Iterable[Any],
    *,
    observe: Where = "inputs",
    forward: Forward = call_model,
    progress: bool = True,
    sensitivity: bool = True,
) -> Diagnosis:
    """Compare a model with its INT8 simulation, layer by layer, and rank the layers by the harm they do.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
        Folded, as it was observed; it is not changed.
    weight_scales, thresholds : mapping
        As for :func:`simulate`. Only layers with a threshold are diagnosed.
    batches : iterable
        Calibration data or, better, other data; iterated once.
    observe : {"inputs", "outputs"}, or a mapping of layer names to these
        Where the thresholds were collected.
    forward : callable (model, batch) -> output
        How to run the model on a batch; the floating point tensors that it returns are compared.
    progress : bool
        Show a bar over layers and batches on a terminal or in a notebook.
    sensitivity : bool
        Also quantize one layer at a time, and all but one, on the first 64 samples. Otherwise these numbers are NaN,
        and the SQNR of the layers' outputs ranks them.

    Returns
    -------
    Diagnosis
        A LayerDiagnosis for each layer, the most harmful first. The numbers of a layer are over all its calls. If its
        calls or shapes differ between the two models, its outputs are not compared, and its note says so.

    Raises
    ------
    InvalidInputError
        For no batches, a model in training mode, a model output without floating point tensors, or with other
        shapes in INT8.

    Notes
    -----
    Cost: two runs of the model for each batch, and with `sensitivity` two more for each layer and batch, up to the
    batch that brings the number of samples to 64. With 128 samples or more that is at most (layers + 2) runs over all
    data. Memory: one copy of the model, float64 sums, and the outputs of all layers on one batch; if they do not fit,
    use smaller batches. How the data are split changes the numbers only by rounding, as long as the 64 samples are the
    same.
    """
    check_eval(model)
    measured = Measurements(model, weight_scales, thresholds, observe)
    number, samples = -1, 0
    tried = 2 * len(thresholds) if sensitivity else 0
    with torch.no_grad(), progress_bar("diagnosis" if progress else "", batches, steps=2 + tried) as advance:
        for number, batch in enumerate(batches):
            run = Run(batch, number, forward, advance)
            measured.compare_layers(run)
            if sensitivity and samples < TRIED_SAMPLES:
                measured.try_each_layer(run)
            else:
                for _ in range(tried):
                    advance()
            samples += _num_samples(batch)
    if number < 0:
        raise InvalidInputError("expected at least one batch, got none")
    layers = [_describe(name, sums, sensitivity) for name, sums in measured.layers.items()]
    return Diagnosis(sorted(layers, key=_harm), measured.model.sqnr_db, measured.model.cosine)


def _num_samples(batch: Any) -> int:
    """Return the length of the first tensor of a batch."""
    return next((tensor.shape[0] for tensor in tensors_in(batch) if tensor.ndim), 1)


def _describe(name: str, sums: LayerSums, sensitivity: bool) -> LayerDiagnosis:
    output = NOTHING if sums.differs else sums.output
    return LayerDiagnosis(
        name,
        sums.weights.sqnr_db,
        sums.activation.sqnr_db,
        output.cosine,
        output.sqnr_db,
        sums.alone.sqnr_db if sensitivity else math.nan,
        sums.without.sqnr_db if sensitivity else math.nan,
        sums.differs or ("" if sums.calls else "never called on these data"),
    )


def _harm(layer: LayerDiagnosis) -> float:
    """Sort key: the least SQNR first, then what could not be measured."""
    sqnr_db = layer.output_sqnr_db if math.isnan(layer.alone_sqnr_db) else layer.alone_sqnr_db
    return math.inf if math.isnan(sqnr_db) else sqnr_db


def _nan_if_null(value: Any) -> Any:
    return math.nan if value is None else value
