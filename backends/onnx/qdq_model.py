"""The result of quantizing an ONNX model."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import onnx

from ..html_tables import html_skipped, html_table
from ..ranges import Range
from ..reprs import counted, left_out, refuse_call
from ..text import number
from .model.saving import save_model
from .tensor_checks import Verification


class QDQModel(NamedTuple):
    """A model with QuantizeLinear and DequantizeLinear nodes (Q/DQ), from :func:`quantize`."""

    model: onnx.ModelProto
    thresholds: dict[str, float]
    """T of each quantized activation, by tensor name; tensors that share a scale have equal T."""
    skipped: dict[str, str]
    """Why layers stay in floating point, by node name."""
    verification: Verification | None = None
    """How the engine ran the model, if :func:`quantize` had data for it."""
    corrections: Mapping[str, float] = {}
    """The largest correction of a bias of each layer, in units of its output, by node name."""
    ranges: Mapping[str, Range] = {}
    """The smallest and the largest value that the integers of each quantized activation stand for."""
    smoothed: tuple[str, ...] = ()
    """Activations whose channels were scaled by SmoothQuant: T and range are those of the scaled values."""
    float_nodes: tuple[str, ...] = ()
    """Nodes without weights, such as those of SiLU, that stay in floating point because it improves the outputs."""

    def save(self, path: str | Path) -> None:
        """Write the model atomically; above 2 GB the weights go to a second file beside it."""
        save_model(self.model, path)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Raise ArrayTypeError: `.model` is an onnx.ModelProto, which an engine runs."""
        refuse_call(self)

    def __repr__(self) -> str:
        """Return the result in one line."""
        activations = f"{counted(len(self.thresholds), 'activation')} in INT8"
        corrected = f", biases of {counted(len(self.corrections), 'layer')} corrected" if self.corrections else ""
        smoothed = f", {counted(len(self.smoothed), 'activation')} smoothed" if self.smoothed else ""
        floats = f", {counted(len(self.float_nodes), 'node')} without weights in float" if self.float_nodes else ""
        return f"QDQModel({activations}{left_out(self.skipped)}{floats}{smoothed}{corrected})"

    def _repr_html_(self) -> str:
        """Return a table of the thresholds and ranges for notebooks."""
        ends = {name: self.ranges.get(name, (None, None)) for name in self.thresholds}
        rows = [(name, *map(number, (threshold, *ends[name]))) for name, threshold in self.thresholds.items()]
        caption = f"ONNX model quantized: {len(rows)} activations"
        return html_table(caption, ("tensor", "T", "low", "high"), rows) + html_skipped(self.skipped)
