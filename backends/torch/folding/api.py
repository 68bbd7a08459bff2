"""Decide which BatchNorm and ReLU can be folded into the layer that feeds them, and say why not for the others.

A pair is folded only if one run of the model shows that it is safe: the layer is called once, what it returns
is used once, by that BatchNorm, which is called once. For a ReLU it is enough that nothing else uses what the
layer returns: relu(relu(x)) = relu(x), so the ReLU itself can stay for its other callers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from ..model.dataflow import Recording, outputs_agree, record_calls
from ..model.edits import copy_model, restored, without_nested_tensors
from ..model.forward import Forward, call_model, check_eval, naming_errors
from ..model.layers import check_supported, skipped_layers
from ..model.norms import other_norms
from ..model.quantized import check_float
from .apply import Fold, fold_in_place
from .decide import all_folds, norm_folds, relu_folds

__all__ = ["Examination", "Fold", "examine", "fold_batch_norm", "fold_relu", "plan_folds"]


class Examination(NamedTuple):
    """What one run of a model showed; to JSON and back with ``_asdict()`` and ``Fold(*...)``."""

    folds: list[Fold]
    """One entry for each BatchNorm, and for each layer that can be joined with its ReLU."""
    skipped: dict[str, str]
    """What computes with weights or multiplies activations and stays in floating point, by module name, and why."""


def examine(model: nn.Module, batch: Any, *, forward: Forward = call_model) -> Examination:
    """Find what can be folded in a model and what of it will not be quantized.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
        It is not changed.
    batch
        One batch of input, to see what feeds what.
    forward : callable (model, batch) -> output
        How to run the model on a batch.

    Returns
    -------
    Examination

    Raises
    ------
    InvalidInputError
        If a module is in training mode, or lazy and not initialized.

    Notes
    -----
    The folded model is run on the batch too. If its output is another one (something used a tensor where no recording
    sees it: compiled functions, ...), or it fails, the folds that are to blame are found by halving and left alone.
    """
    check_eval(model)
    return examine_copy(copy_to_fold(model), batch, forward)


def copy_to_fold(model: nn.Module) -> nn.Module:
    """Return a copy of the model that can be examined and folded in place."""
    check_supported(model)
    check_float(model)
    return without_nested_tensors(copy_model(model))


def examine_copy(model: nn.Module, batch: Any, forward: Forward) -> Examination:
    """Do what :func:`examine` does with a copy of a model, and leave the copy as it was."""
    seen, folds = _plan(model, batch, forward, all_folds)
    skipped = skipped_layers(model)
    inside = tuple(f"{name}." for name in skipped)
    computed = {
        name: f"{', '.join(dict.fromkeys(functions))} computes in floating point"
        for name, functions in seen.products.items()
        if name not in skipped and not name.startswith(inside)
    }
    return Examination(folds, {**skipped, **dict(other_norms(model)), **computed})


def plan_folds(model: nn.Module, batch: Any, *, forward: Forward = call_model) -> list[Fold]:
    """Decide what :func:`apply_folds` shall do; see :func:`examine`, of which this is the first half.

    Parameters
    ----------
    model, batch, forward
        As for :func:`examine`.

    Returns
    -------
    list of Fold
        One entry for each BatchNorm, and for each layer that can be joined with its ReLU.

    Raises
    ------
    InvalidInputError
        As for :func:`examine`.
    """
    return examine(model, batch, forward=forward).folds


def fold_batch_norm(model: nn.Module, batch: Any, *, forward: Forward = call_model) -> tuple[nn.Module, list[Fold]]:
    """Fold every BatchNorm that can be into the convolution or linear layer that feeds it.

    With ``factor = gamma / sqrt(var + eps)`` along the output channels, ``w' = w * factor`` and
    ``b' = beta + (b - mean) * factor``; the BatchNorm becomes an identity.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
    batch
        One batch of input, to see what feeds what.
    forward : callable (model, batch) -> output
        How to run the model on a batch.

    Returns
    -------
    model : torch.nn.Module
        A folded copy.
    folds : list of Fold
        One entry for each BatchNorm.

    Raises
    ------
    InvalidInputError
        If a module is in training mode: BatchNorm would use the statistics of the batch.

    Notes
    -----
    The arithmetic is ``torch.nn.utils.fusion``'s, in float64, rounded once to the dtype of the layer. Left alone are
    layers with shared or parametrized weights or hooks, grouped transposed convolutions, BatchNorm without running
    statistics and after a linear layer on anything but (batch, features).
    """
    return _fold(model, batch, forward, norm_folds)


def fold_relu(model: nn.Module, batch: Any, *, forward: Forward = call_model) -> tuple[nn.Module, list[Fold]]:
    """Join every ReLU (or ReLU6) with the convolution or linear layer that feeds it, so that they are observed as one.

    Parameters
    ----------
    model, batch, forward
        As for :func:`fold_batch_norm`; fold BatchNorm first.

    Returns
    -------
    model : torch.nn.Module
        A copy in which such a layer is a :class:`LayerReLU` under its old name. The ReLU stays where it was: a
        second one changes nothing, and a module that is used in several places goes on serving the others.
    folds : list of Fold
        One entry for each layer that was joined with its ReLU.

    Raises
    ------
    InvalidInputError
        If a module is in training mode.
    """
    return _fold(model, batch, forward, relu_folds)


_Decide: TypeAlias = Callable[[nn.Module, Recording], list[Fold]]


def _fold(model: nn.Module, batch: Any, forward: Forward, decide: _Decide) -> tuple[nn.Module, list[Fold]]:
    """Return a folded copy, and the folds."""
    check_eval(model)
    folded = copy_to_fold(model)
    _, folds = _plan(folded, batch, forward, decide)
    fold_in_place(folded, folds)
    return folded, folds


def _plan(model: nn.Module, batch: Any, forward: Forward, decide: _Decide) -> tuple[Recording, list[Fold]]:
    """Record one run, decide, and keep the folds that leave the output as it was; the model is restored."""

    def run(folds: list[Fold]) -> Recording:
        with restored(model):
            fold_in_place(model, folds)
            return record_calls(model, lambda: named(model, batch))

    def keeps_output(layers: list[Any]) -> bool:
        try:
            return outputs_agree(run([fold for fold in folds if fold.into in layers]).output, seen.output)
        except Exception:  # the model may look for attributes that an identity has not
            return False

    named = naming_errors(forward)
    seen = run([])
    folds = decide(model, seen)
    layers = list(dict.fromkeys(fold.into for fold in folds if not fold.reason))
    sound = _sound(keeps_output, [], layers)
    if len(sound) == len(layers):
        return seen, folds
    reason = "folding changes the output of the model or makes it fail"
    if not outputs_agree(run([]).output, seen.output):
        reason = "the output of the model is another one each time that it is run"
    return seen, [fold if fold.reason or fold.into in sound else fold._replace(reason=reason) for fold in folds]


def _sound(agrees: Callable[[list[Any]], bool], kept: list[Any], layers: list[Any]) -> list[Any]:
    """Return those of the layers that can be folded along with `kept`, by halving."""
    if not layers or agrees(kept + layers):
        return layers
    if len(layers) == 1:
        return []
    half = len(layers) // 2
    first = _sound(agrees, kept, layers[:half])
    return first + _sound(agrees, kept + first, layers[half:])
