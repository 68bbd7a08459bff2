"""Empirical bias correction: rounding shifts the mean of a layer's output, and the bias can compensate for it.

After M. Nagel, M. van Baalen, T. Blankevoort and M. Welling, Data-Free Quantization Through Weight Equalization and
Bias Correction, ICCV 2019, appendix D; here the input is rounded as well.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from klquant.errors import InvalidInputError

from ...batches import tracked
from ..model.calls import Calls, layer_of
from ..model.edits import copy_model
from ..model.forward import Forward, call_model, check_eval, run_observed
from ..model.layers import LayerWrapper, Tap, inner_layer, weighted_layers
from ..simulation import QuantizedLayer, quantized_layers


def correct_bias(
    simulated: nn.Module,
    reference: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward = call_model,
    progress: bool = True,
) -> tuple[nn.Module, dict[str, float]]:
    """Add to the bias of each quantized layer what rounding takes from the mean of each output channel.

    The new bias is ``b_c + mean(W x - W_hat x_hat)_c`` over the data and all positions, before the ReLU, where x is the
    layer's input in the floating point model.

    Parameters
    ----------
    simulated : torch.nn.Module
        The result of :func:`simulate`.
    reference : torch.nn.Module, in eval mode
        The floating point model that was simulated, with the same folds and equalization.
    batches : iterable
        Calibration data, iterated once.
    forward : callable (model, batch) -> output
        How to run the model on a batch.
    progress : bool
        Show a bar on a terminal or in a notebook.

    Returns
    -------
    model : torch.nn.Module
        A corrected copy of `simulated`; layers without a bias get one.
    corrections : dict
        The largest absolute correction of each layer that was called, in units of its output.

    Raises
    ------
    InvalidInputError
        If `simulated` has no quantized layer, or one that `reference` lacks or has in another shape; for no batches, a
        model in training mode, NaN or infinity.

    Notes
    -----
    Apart from its bias a layer is linear, so it is enough to sum up its inputs in float64 and to run the layer once, on
    the sums. The result does not depend on how the data are split, up to the rounding of float64, and memory does not
    grow with them. With ``observe="outputs"`` a layer does not round its input, so only the rounding of the weights is
    corrected. Correcting twice is the same as once.
    """
    check_eval(reference)
    corrected = copy_model(simulated)
    return corrected, correct_in_place(corrected, reference, batches, forward=forward, progress=progress)


def correct_in_place(
    simulated: nn.Module, reference: nn.Module, batches: Iterable[Any], *, forward: Forward, progress: bool
) -> dict[str, float]:
    """Do what :func:`correct_bias` does, to the simulated model itself; return the corrections."""
    quantized = {name: m for name, m in simulated.named_modules() if _has_weights(m)}
    taps = quantized_layers(simulated) if quantized else {}
    layers = dict(weighted_layers(reference))
    _check_names(quantized, layers)
    shifts = {name: _Shift(layers[name], layer) for name, layer in quantized.items()}

    def observer(name: str, tensor: torch.Tensor) -> None:
        if layer_of(name) in shifts and name in taps:
            shifts[layer_of(name)].update(tensor, input_quantizer(taps[name]))

    description = "bias correction" if progress else ""
    if not run_observed(reference, tracked(batches, description), observer, forward=forward):
        raise InvalidInputError("expected at least one calibration batch, got none")
    with torch.no_grad():
        means = {name: shift.mean() for name, shift in shifts.items() if shift.was_called}
    for name, mean in means.items():
        _set_bias(inner_layer(quantized[name].layer), inner_layer(layers[name]).bias, mean)
    return {name: float(mean.abs().max()) for name, mean in means.items()}


def _has_weights(module: nn.Module) -> bool:
    return isinstance(module, (QuantizedLayer, Calls)) and not isinstance(module.layer, Tap)


def _check_names(quantized: dict[str, Any], layers: dict[str, Any]) -> None:
    if not quantized:
        raise InvalidInputError("`simulated` must be the result of simulate(), got a model without quantized layers")
    if missing := sorted(quantized.keys() - layers.keys()):
        raise InvalidInputError(f"`reference` must be the model that was simulated, got one without {missing}")
    for name, layer in quantized.items():
        shapes = [tuple(inner_layer(each).weight.shape) for each in (layers[name], layer.layer)]
        if shapes[0] != shapes[1]:
            raise InvalidInputError(
                f"layer `{name}`: `reference` must be the model that was simulated, got weights of shape "
                f"{shapes[0]}, not {shapes[1]}"
            )


class _Shift:
    """The mean difference between a layer and its quantized form, for each output channel."""

    def __init__(self, layer: nn.Module, quantized: LayerWrapper) -> None:
        self._layers = inner_layer(layer), inner_layer(quantized.layer)
        self._sums: list[torch.Tensor] = []  # of x and of x_hat, over `_samples` samples
        self._samples = 0
        self._total: Any = 0.0
        self._count = 0

    @property
    def was_called(self) -> bool:
        return self._samples + self._count > 0

    def update(self, x: torch.Tensor, rounded: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add a batch of inputs, and the same rounded."""
        sums = [_sum_up(value, self._layers[0]) for value in (x, rounded(x))]
        if not sums[0].isfinite().all():
            raise InvalidInputError("activations must be finite, got NaN or infinity")
        if self._samples and self._sums[0].shape == sums[0].shape:
            sums = [old + new for old, new in zip(self._sums, sums, strict=True)]
        else:  # samples of another shape: start new sums
            self._flush()
        self._sums = sums
        self._samples += x.numel() // max(1, sums[0].numel())

    def mean(self) -> torch.Tensor:
        """Return what to add to the bias."""
        self._flush()
        mean: torch.Tensor = self._total / self._count
        return mean

    def _flush(self) -> None:
        if not self._samples:
            return
        exact, rounded = (_apply_linear(layer, x) for layer, x in zip(self._layers, self._sums, strict=True))
        self._total = self._total + (exact - rounded).sum(1)
        self._count += self._samples * exact.shape[1]
        self._samples = 0


def input_quantizer(quantized: QuantizedLayer) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that the quantized layer applies to its input: the layer itself around an identity."""
    if quantized.observe != "inputs":
        return nn.Identity()
    rounding = copy.copy(quantized)
    rounding._modules = {"layer": nn.Identity()}
    return rounding


def _sum_up(x: torch.Tensor, layer: Any) -> torch.Tensor:
    """Return the sum of all samples in float64, as a batch of one."""
    sample = x.shape[1 - layer.weight.ndim :]  # one dimension for linear layers, rank + 1 for convolutions
    total: torch.Tensor = x.reshape(-1, *sample).sum(0, keepdim=True, dtype=torch.float64)
    return total


def _apply_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return W x in float64, of shape (output channels, positions)."""
    linear = copy.copy(layer)
    linear._parameters = {"weight": nn.Parameter(layer.weight.detach().double(), requires_grad=False), "bias": None}
    output: torch.Tensor = linear.forward(x)[0]  # without the hooks of the layer
    return output.reshape(len(output), -1)


def _set_bias(layer: Any, bias: torch.Tensor | None, shift: torch.Tensor) -> None:
    shifted = shift if bias is None else bias.detach().double() + shift
    layer.bias = nn.Parameter(shifted.to(layer.weight.dtype), requires_grad=False)
