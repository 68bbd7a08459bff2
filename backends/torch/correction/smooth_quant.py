"""SmoothQuant: move the differences between the channels of an activation into the weights that it is multiplied by.

After G. Xiao, J. Lin, M. Seznec, H. Wu, J. Demouth and S. Han, SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models, ICML 2023. One scale holds for all channels of x, so a few large channels leave
few levels to all others. Dividing channel j of x by s_j > 0 and multiplying column j of W by s_j changes
nothing in W x.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from klquant.errors import InvalidInputError

from ...batches import check_repeatable, first_batches
from ...smoothing import WORTH, WORTH_A_NODE, Channels, Reader, choose_factors
from ..model.dataflow import Recording, count_uses, recording, tensors_in
from ..model.edits import replace_module
from ..model.forward import Forward, call_model, check_eval, naming_errors, run_observed
from ..model.hooks import active
from ..model.layers import check_supported, weighted_layers
from ..model.plain import plain_copy

logger = logging.getLogger("klquant")


class ScaledLinear(nn.Module):
    """A linear layer behind a factor for each of its input channels. It has the attributes of the layer."""

    def __init__(self, linear: nn.Module, factors: torch.Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("factors", factors)
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """Return the attribute of the layer if this has none, since models read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return getattr(super().__getattr__("linear"), name)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 the name that nn.Linear has
        """Return linear(factors * input)."""
        result: torch.Tensor = self.linear(input * self.factors)
        return result


class _Group(NamedTuple):
    """Linear layers that read one activation."""

    layers: list[str]
    norm: str | None
    """What computes it, if that can take up the inverse factors: nothing else reads it."""


class _Seen:
    """The channels of an activation over all batches."""

    def __init__(self) -> None:
        self.low, self.high, self.power, self.count = (np.zeros(1) for _ in range(4))

    def add(self, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        if not bool(rows.isfinite().all()):
            raise InvalidInputError("values must be finite, got NaN or infinity")
        if len(rows):
            self.low = np.minimum(self.low, rows.amin(0).cpu().numpy())
            self.high = np.maximum(self.high, rows.amax(0).cpu().numpy())
            self.power, self.count = self.power + rows.square().sum(0).cpu().numpy(), self.count + len(rows)

    def channels(self) -> Channels:
        return Channels(self.low, self.high, self.power / np.maximum(self.count, 1))


def smooth(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    alpha: float | None = None,
    num_batches: int | None = None,
    forward: Forward = call_model,
) -> nn.Module:
    """Move the differences between the channels of activations into the linear layers that read them.

    ``s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)``; x_j is divided by it and W_j multiplied, for all linear layers that
    read x. The result computes the same as the model, up to rounding; quantize it in the model's place.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
        It is not changed.
    batches : iterable
        Calibration data, as for :func:`quantize`; iterated twice.
    alpha : float, optional
        In 0 .. 1: how far to even out the activations (1) rather than the weights (0). Without a value it is chosen for
        each x by the error that is expected from 8 bits, and x is left alone where that does not fall.
    num_batches : int, optional
        Use only so many batches.
    forward : callable (model, batch) -> output
        How to run the model on a batch.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    InvalidInputError
        For an alpha outside 0 .. 1, a model in training mode, no batches, NaN or infinity in an activation, naming
        layer and batch.
    ModelError
        If the model fails on a batch, naming batch and layer.

    Notes
    -----
    A LayerNorm or RMSNorm takes up 1 / s if nothing but these layers reads it. Other inputs with negative values are
    multiplied by 1 / s in front of each layer, if the expected error falls by a fifth at least; that costs time.
    Source: Xiao et al., SmoothQuant, 2023.
    """
    check_eval(model)
    check_supported(model)
    if alpha is not None and not 0 <= alpha <= 1:
        raise InvalidInputError(f"`alpha` must be in 0 .. 1, got {alpha}")
    batches = first_batches(batches, num_batches)
    check_repeatable(batches, "pass a list or a DataLoader")
    smoothed = plain_copy(model)
    groups = [group for batch in _first(batches) for group in _find_groups(smoothed, batch, naming_errors(forward))]
    seen = _observe(smoothed, groups, batches, forward)
    done = [_smooth_group(smoothed, group, seen[group.layers[0]].channels(), alpha) for group in groups]
    logger.info("smoothed the inputs of %d of %d groups of linear layers", sum(done), len(done))
    return smoothed


def has_norms(model: nn.Module) -> bool:
    """Return whether a model has a LayerNorm or the like: smoothing is for what lies behind these."""
    return any(map(_scales_with_its_weight, model.modules()))


def _first(batches: Iterable[Any]) -> list[Any]:
    for batch in batches:
        return [batch]
    raise InvalidInputError("expected at least one batch, got none")


def _observe(model: nn.Module, groups: list[_Group], batches: Iterable[Any], forward: Forward) -> dict[str, _Seen]:
    seen = {group.layers[0]: _Seen() for group in groups}
    places: Any = dict.fromkeys(seen, "inputs")
    run_observed(model, batches, lambda name, x: seen[name].add(x), observe=places, forward=forward)
    return seen


def _smooth_group(model: nn.Module, group: _Group, channels: Channels, alpha: float | None) -> bool:
    """Scale the layers of a group, if that is worth it; return whether it was."""
    layers: list[Any] = [model.get_submodule(name) for name in group.layers]
    weights = [layer.weight.detach().double().cpu().numpy()[None, :, :, None] for layer in layers]
    factors, ratio = choose_factors([Reader(weight, channels) for weight in weights], alpha)
    least = WORTH_A_NODE if group.norm is None else WORTH if alpha is None else np.inf
    if ratio > least or (group.norm is None and channels.low.min() >= 0):
        return False
    scale = torch.from_numpy(factors).to(layers[0].weight.device)
    norm = None if group.norm is None else model.get_submodule(group.norm)
    with torch.no_grad():
        for parameter in () if norm is None else norm.parameters(recurse=False):
            parameter.copy_(parameter.double() / scale)
        for layer in layers:
            layer.weight.copy_(layer.weight.double() * scale)
            if norm is None:
                replace_module(layer, ScaledLinear(layer, (1 / scale).to(layer.weight.dtype)))
    return True


def _find_groups(model: nn.Module, batch: Any, forward: Forward) -> list[_Group]:
    """Run the model on a batch; return the linear layers that read the same tensor and may be scaled."""
    linears = [name for name, layer in weighted_layers(model) if isinstance(layer, nn.Linear)]
    norms = [name for name, module in model.named_modules() if _scales_with_its_weight(module)]
    read: dict[int, tuple[torch.Tensor, list[str]]] = {}  # with the tensors, so that no id is used again
    made: dict[int, str] = {}

    def entering(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in tensors_in((args, kwargs)):
                read.setdefault(id(tensor), (tensor, []))[1].append(name)

        return hook

    def leaving(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            made.update((id(tensor), name) for tensor in tensors_in(output))

        return hook

    def hooks() -> Iterator[RemovableHandle]:
        for name in linears:
            yield model.get_submodule(name).register_forward_pre_hook(entering(name), with_kwargs=True)
        for name in norms:
            yield model.get_submodule(name).register_forward_hook(leaving(name))

    with torch.no_grad(), recording(model, [*linears, *norms]) as run, active(hooks()):
        forward(model, batch)
    fixed = _fixed(model, run)
    groups = (_Group(names, _absorbing(made.get(key), names, run, fixed)) for key, (_, names) in read.items())
    return [group for group in groups if fixed.isdisjoint(group.layers)]


def _fixed(model: nn.Module, run: Recording) -> set[str]:
    """Return the modules that must stay as they are: called several times, shared, or read elsewhere."""
    uses = count_uses(model)
    shared = {name for name in run.calls for p in model.get_submodule(name).parameters() if uses[id(p)] > 1}
    return shared | run.read | {name for name, calls in run.calls.items() if len(calls) != 1}


def _absorbing(norm: str | None, layers: list[str], run: Recording, fixed: set[str]) -> str | None:
    """Return the name of the norm if it can take up the inverse factors."""
    if norm is None or norm in fixed:
        return None
    readers = [consumer.module for consumer in run.calls[norm][0].consumers]
    return norm if sorted(map(str, readers)) == sorted(layers) else None


def _scales_with_its_weight(module: nn.Module) -> bool:
    """Return whether a module is a LayerNorm, RMSNorm or the like: half the weight and bias gives half the output."""
    parameters = module._parameters
    weight = parameters.get("weight")
    if (
        module._modules
        or module._buffers
        or weight is None
        or weight.ndim != 1
        or not {*parameters} <= {"weight", "bias"}
    ):
        return False
    half = copy.deepcopy(module)
    x = torch.linspace(-1, 2, 2 * len(weight), dtype=weight.dtype, device=weight.device).reshape(2, -1)
    with torch.no_grad():
        for parameter in half.parameters():
            parameter.mul_(0.5)
        try:
            whole = module(x)
            return bool(torch.equal(half(x), whole / 2) and whole.shape == x.shape and not torch.equal(whole, x))
        except Exception:  # whatever a module of others raises on such an input
            return False
