"""Cross-layer equalization: scale the channels between two layers so that both are easier to quantize.

After M. Nagel, M. van Baalen, T. Blankevoort and M. Welling, Data-Free Quantization Through Weight Equalization and
Bias Correction, ICCV 2019. Where ReLU(W1 x + b1) enters W2, dividing row c of W1 and b1 by s_c > 0 and multiplying
column c of W2 by s_c changes nothing in exact arithmetic, and with powers of two nothing in floating point.

With s_c = sqrt(r1_c / r2_c) both ranges of a channel become sqrt(r1_c r2_c). A layer in the middle of a chain is second
of one pair and first of the next, so a pair that has been equalized is disturbed by its neighbours: sweeps over all
pairs are repeated until no factor changes. The exponents are rounded to integers, so this usually takes few sweeps.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from klquant.errors import InvalidInputError

from ..model.dataflow import count_uses, outputs_agree, record_calls
from ..model.edits import copy_model, restored
from ..model.forward import Forward, call_model, check_eval, naming_errors
from ..model.layers import TRANSPOSED, inner_layer, weighted_layers
from .channel_flow import Chain, follow_chains

_MAX_SWEEPS = 100  # in case rounded factors keep changing


class Equalized(NamedTuple):
    """What happened to the channels between a layer and the next."""

    first: str
    """Qualified name of the layer whose output channels these are."""
    second: str | None
    """Qualified name of the layer that they enter, or None."""
    reason: str
    """Why they were left alone; empty if they were equalized."""
    largest_factor: float
    """Largest s_c or 1 / s_c over the channels; 1 if nothing was scaled."""


class _Pair(NamedTuple):
    first: Any
    second: Any
    positions: int


def equalize(model: nn.Module, batch: Any, *, forward: Forward = call_model) -> tuple[nn.Module, list[Equalized]]:
    """Equalize the ranges of the weights on both sides of every channel between two layers.

    ``s_c = sqrt(r1_c / r2_c)``, rounded to a power of two, where r1_c is the largest absolute weight of the first
    layer's output channel c and r2_c that of the second layer's input channel c. The new parameters are ``W1_c / s_c``,
    ``b1_c / s_c`` and ``W2_c * s_c``; sweeps over all pairs are repeated until nothing changes.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
        Call :func:`fold_batch_norm` and :func:`fold_relu` first: a BatchNorm between two layers forbids scaling.
    batch
        One batch of input, to see what feeds what.
    forward : callable (model, batch) -> output
        How to run the model on a batch.

    Returns
    -------
    model : torch.nn.Module
        An equalized copy that computes the same bits, unless a number overflows or underflows.
    equalized : list of Equalized
        One entry for each layer that was called.

    Raises
    ------
    InvalidInputError
        If a module is in training mode.

    Notes
    -----
    A pair is equalized only if one run shows that both layers are called once and that nothing lies between them but
    ReLU, leaky ReLU, pooling, Dropout, Identity and Flatten, each with the only use of its input. Hooks and shared or
    parametrized weights forbid it. A channel whose weights are all 0 on one side keeps s = 1.
    """
    check_eval(model)
    equalized = copy_model(model)
    entries, is_same = _try(equalized, batch, forward)
    return equalized if is_same else copy_model(model), entries


def find_pairs(model: nn.Module, batch: Any, forward: Forward) -> list[Equalized]:
    """Return what :func:`equalize` finds for a model that the caller owns; the model stays as it was."""
    with restored(model):
        return _try(model, batch, forward)[0]


def apply_equalization(model: nn.Module, equalized: Iterable[Equalized]) -> nn.Module:
    """Return a copy of the model with the pairs equalized that :func:`equalize` found, without data.

    Parameters
    ----------
    model : torch.nn.Module
        The model that was equalized, or one with the same layers. It is not changed.
    equalized : iterable of Equalized
        The second result of :func:`equalize`; entries with a reason are skipped.

    Returns
    -------
    torch.nn.Module

    Raises
    ------
    InvalidInputError
        If a named layer is missing or has another number of channels.
    """
    model = copy_model(model)
    equalize_in_place(model, equalized)
    return model


def equalize_in_place(model: nn.Module, equalized: Iterable[Equalized]) -> list[Equalized]:
    """Do what :func:`apply_equalization` does, to the model itself; return the entries with their factors."""
    entries, layers = list(equalized), dict(weighted_layers(model))
    factors = _sweep({entry.first: _pair(entry, layers) for entry in entries if not entry.reason})
    return [entry._replace(largest_factor=factors.get(entry.first, 1.0)) for entry in entries]


def _try(model: nn.Module, batch: Any, forward: Forward) -> tuple[list[Equalized], bool]:
    """Equalize the model itself; return the entries, and whether the output stayed the same."""
    forward = naming_errors(forward)
    with restored(model):
        chains, used, expected = follow_chains(model, lambda: forward(model, batch))
    entries = equalize_in_place(model, _entries(model, chains, dict(weighted_layers(model)), used))
    if outputs_agree(record_calls(model, lambda: forward(model, batch)).output, expected):
        return entries, True
    return [entry if entry.reason else _undone(entry) for entry in entries], False


def _pair(entry: Equalized, layers: dict[str, nn.Module]) -> _Pair:
    if entry.first not in layers or entry.second not in layers:
        raise InvalidInputError(f"the pairs must be those of this model, got `{entry.first}` and `{entry.second}`")
    first, second = inner_layer(layers[entry.first]), inner_layer(layers[entry.second])
    leaving = first.out_features if isinstance(first, nn.Linear) else first.out_channels
    entering = second.in_features if isinstance(second, nn.Linear) else second.in_channels
    if entering % leaving:
        raise InvalidInputError(
            f"`{entry.second}` must take the {leaving} channels of `{entry.first}`, got {entering} inputs"
        )
    return _Pair(first, second, entering // leaving)


def _entries(model: nn.Module, chains: list[Chain], layers: dict[str, nn.Module], used: set[int]) -> list[Equalized]:
    """Decide for each layer whether its output channels can be scaled."""
    calls = Counter(chain.first for chain in chains)
    uses = count_uses(model)

    def reason(chain: Chain) -> str:
        for name in filter(None, (chain.first, chain.second)):
            if calls[name] > 1:
                return f"`{name}` is called more than once"
            if why := _obstacle(layers[name], uses, used):
                return f"`{name}` {why}"
        return chain.reason

    last = {chain.first: chain for chain in chains}
    return [Equalized(name, chain.second, reason(chain), 1.0) for name, chain in last.items()]


def _undone(entry: Equalized) -> Equalized:
    return entry._replace(reason="equalizing changed the output of the model", largest_factor=1.0)


def _obstacle(layer: nn.Module, uses: Counter[int], used: set[int]) -> str:
    parameters = [p for m in layer.modules() for p in m.parameters(recurse=False)]
    if any(uses[id(p)] > 1 for p in parameters):
        return "shares weights with another module"
    if any(id(p) in used for p in parameters):
        return "has weights that are used elsewhere too"
    if "bias" not in inner_layer(layer)._parameters:
        return "has a bias that is not a parameter"
    return "has hooks" if any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules()) else ""


def _sweep(pairs: dict[str, _Pair]) -> dict[str, float]:
    """Equalize all pairs until nothing changes; return the largest factor of each."""
    totals: dict[str, Any] = dict.fromkeys(pairs, 0.0)
    for _ in range(_MAX_SWEEPS):
        steps = {name: _equalize_pair(pair) for name, pair in pairs.items()}
        totals = {name: total + steps[name] for name, total in totals.items()}
        if not any(step.any() for step in steps.values()):
            break
    return {name: float(total.abs().max().exp2()) for name, total in totals.items()}


def _equalize_pair(pair: _Pair) -> torch.Tensor:
    """Scale both layers once; return log2 of the factors, one for each channel."""
    leaving, entering = _output_axis(pair.first), 3 - _output_axis(pair.second)
    first, second = _ranges(pair.first, leaving), _ranges(pair.second, entering, pair.positions)
    exponents = torch.where((first > 0) & (second > 0), (first / second).log2() / 2, 0.0).round()
    _scale_weight(pair.first, leaving, -exponents)
    if pair.first.bias is not None:
        bias = pair.first.bias
        pair.first.bias = nn.Parameter(bias.detach() * (-exponents).exp2().to(bias), bias.requires_grad)
    _scale_weight(pair.second, entering, exponents, pair.positions)
    return exponents


def _output_axis(layer: Any) -> int:
    """Return the axis of the grouped weight for output channels, 1 or 2; the other one is for input channels."""
    return 2 if isinstance(layer, TRANSPOSED) else 1


def _grouped(layer: Any, positions: int = 1) -> tuple[int, ...]:
    """Return the shape of the weight with axes for groups, the two kinds of channels in a group, and the rest."""
    rows, columns = layer.weight.shape[:2]
    groups = getattr(layer, "groups", 1)
    return (groups, rows // groups, columns // positions, layer.weight[0, 0].numel() * positions)


def _ranges(layer: Any, axis: int, positions: int = 1) -> torch.Tensor:
    """Return the largest absolute weight of each channel."""
    weight: torch.Tensor = layer.weight.detach().double().abs().reshape(_grouped(layer, positions))
    return weight.amax((3 - axis, 3)).flatten().cpu()  # layers may be on different devices


def _scale_weight(layer: Any, axis: int, exponents: torch.Tensor, positions: int = 1) -> None:
    shape, weight = _grouped(layer, positions), layer.weight.detach().clone()  # multiplied in place to keep the strides
    factors = exponents.exp2().reshape([shape[0], *(shape[k] if k == axis else 1 for k in (1, 2)), 1])
    weight.mul_(factors.expand(shape).reshape(weight.shape).to(weight))
    layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
