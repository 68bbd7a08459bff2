"""Run a model in floating point and in INT8 on the same batches, and sum up the differences."""

from collections import deque
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from klquant.errors import InvalidInputError

from ...accuracy.sums import Sums
from ...thresholds import LayerThreshold
from ..model.dataflow import tensors_in
from ..model.forward import Forward, Where, observed_at
from ..model.layers import Tap, inner_layer
from .comparison import Call, SwitchableModel, compare, each_call, fake_quantize_at

NOTHING = Sums()


class LayerSums(NamedTuple):
    """The sums of one layer."""

    weights: Sums
    activation: Sums = NOTHING
    """The observed tensor."""
    output: Sums = NOTHING
    alone: Sums = NOTHING
    """The model's output with this layer only in INT8."""
    without: Sums = NOTHING
    """The model's output with all layers but this one in INT8."""
    calls: int = 0
    differs: str = ""
    """Why the outputs of the layer could not be compared."""


class Run:
    """Runs models on one batch, and compares the outputs of the others with that of the first."""

    def __init__(self, batch: Any, number: int, forward: Forward, advance: Callable[[], None]) -> None:
        self.number = number
        self._batch, self._forward, self._advance = batch, forward, advance
        self._reference: list[torch.Tensor] = []

    def reference(self, model: nn.Module) -> None:
        """Run the model in floating point and keep its output."""
        self._reference = [tensor.clone() for tensor in self._outputs(model)]
        if not self._reference:
            raise InvalidInputError(
                f"batch {self.number}: the model must return a floating point tensor, got none; "
                "pass a `forward` that returns one, such as logits instead of classes"
            )

    def compare(self, model: nn.Module) -> Sums:
        """Run another model and compare its output with that of the first."""
        outputs = self._outputs(model)
        expected, got = ([tuple(tensor.shape) for tensor in tensors] for tensors in (self._reference, outputs))
        if got != expected:
            raise InvalidInputError(
                f"batch {self.number}: the model must return the same shapes in INT8 as in floating point, {expected}, "
                f"got {got}; pass a `forward` that returns the same shapes"
            )
        sums = NOTHING
        for reference, output in zip(self._reference, outputs, strict=True):
            sums = sums.plus(compare(reference, output))
        return sums

    def _outputs(self, model: nn.Module) -> list[torch.Tensor]:
        outputs = [tensor for tensor in tensors_in(self._forward(model, self._batch)) if tensor.is_floating_point()]
        self._advance()
        return outputs


class Measurements:
    """Sums over batches, for the whole model and for each layer with a threshold."""

    def __init__(
        self,
        model: nn.Module,
        weight_scales: Mapping[str, torch.Tensor],
        thresholds: Mapping[str, LayerThreshold],
        observe: Where,
    ) -> None:
        self._float_model, self._thresholds, self._observe = model, thresholds, observe
        self._switchable = SwitchableModel(model, weight_scales, thresholds, observe)
        self.model = NOTHING
        self.layers = {name: LayerSums(self._compare_weights(name)) for name in thresholds}

    def compare_layers(self, run: Run) -> None:
        """Run both models on a batch, and compare the outputs of their layers call by call."""
        kept: dict[str, deque[torch.Tensor]] = {name: deque() for name in self.layers}

        def keep(call: Call) -> None:
            kept[call.layer].append(call.output.clone())  # the model may write to it later
            tensor = call.output if observed_at(call.layer, self._observe) == "outputs" else call.input
            approximation = fake_quantize_at(tensor, self._thresholds[call.layer])
            self._add(call.layer, "activation", compare(tensor, approximation))
            self._set(call.layer, calls=self.layers[call.layer].calls + 1)

        def compare_with_kept(call: Call) -> None:
            expected = kept[call.layer].popleft() if kept[call.layer] else None
            if expected is None or expected.shape != call.output.shape:
                self._differs(call.layer, run)
            else:
                self._add(call.layer, "output", compare(expected, call.output))

        with each_call(self._switchable.floats, keep):
            run.reference(self._float_model)
        with each_call(self._switchable.quantized, compare_with_kept):
            self.model = self.model.plus(self._compare_with_int8(self.layers, run))
        for name in (name for name, left in kept.items() if left):
            self._differs(name, run)

    def try_each_layer(self, run: Run) -> None:
        """Run the model on the batch with each layer alone in INT8, and with each alone in floating point."""
        for name in self.layers:
            self._add(name, "alone", self._compare_with_int8({name}, run))
            self._add(name, "without", self._compare_with_int8(self.layers.keys() - {name}, run))

    def _compare_with_int8(self, names: Container[str], run: Run) -> Sums:
        return run.compare(self._switchable.quantizing(names))

    def _compare_weights(self, name: str) -> Sums:
        floats, quantized = self._switchable.floats[name], self._switchable.quantized[name]
        if isinstance(floats, Tap):
            return NOTHING
        return compare(inner_layer(floats).weight, inner_layer(quantized.layer).weight)

    def _differs(self, name: str, run: Run) -> None:
        what = "its calls differ in number or shape between floating point and INT8, so its outputs are not compared"
        self._set(name, differs=self.layers[name].differs or f"batch {run.number}: {what}")

    def _add(self, name: str, what: str, more: Sums) -> None:
        self._set(name, **{what: getattr(self.layers[name], what).plus(more)})

    def _set(self, name: str, **values: Any) -> None:
        self.layers[name] = self.layers[name]._replace(**values)
