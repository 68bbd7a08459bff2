"""Verify that folds decided on one batch are right on every other, whichever branches the model takes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from klquant.errors import InvalidInputError

from ..model.dataflow import Call, Consumer, Recording, recording
from ..model.forward import Forward
from ..model.hooks import active
from .apply import Fold


@contextmanager
def verify_folds(folded_model: nn.Module, folds: Iterable[Fold]) -> Iterator[None]:
    """Raise, at the end of the block, if a run in it used a folded layer in another way than the fold assumes.

    Parameters
    ----------
    folded_model : torch.nn.Module
        The result of :func:`apply_folds`. It runs in the block, once or several times.
    folds : iterable of Fold
        What was applied.

    Raises
    ------
    InvalidInputError
        Naming layer and BatchNorm or ReLU: if the output of the layer went to anything but what is folded into it, or
        the BatchNorm got anything but that output.

    Notes
    -----
    Register hooks that look at outputs before the block: otherwise they count as uses. :func:`verified_forward` does.
    """
    done = [fold for fold in folds if not fold.reason]
    norms = [fold.module for fold in done if fold.kind == "batch_norm"]
    views = (folded_model.get_submodule(name).register_forward_hook(_view) for name in norms)
    recorded = [*norms, *(str(fold.into) for fold in done)]
    with active(views), recording(folded_model, recorded) as seen:
        yield
    _check(folded_model, done, seen)


def verified_forward(forward: Forward, folds: list[Fold]) -> Forward:
    """Return a `forward` for a folded model that raises on a batch where a fold is wrong; see `verify_folds`."""

    def run(model: nn.Module, batch: Any) -> Any:
        with verify_folds(model, folds):
            return forward(model, batch)

    return run if any(not fold.reason for fold in folds) else forward


def _view(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Return the output as another tensor object: a later use of the same object is one of the layer's own output."""
    return output.view_as(output)


def _check(model: nn.Module, folds: list[Fold], seen: Recording) -> None:
    last: dict[str, str] = {}  # by layer, the last BatchNorm folded into it: this returns the layer's output
    for fold in folds:
        into = str(fold.into)
        calls = seen.calls[last.get(into, into)]
        _check_uses(fold, calls)
        if fold.kind == "batch_norm":
            _check_norm(fold, calls, seen, model.get_submodule(into))
            last[into] = fold.module


def _check_uses(fold: Fold, calls: list[Call]) -> None:
    for call in calls:
        if len(call.consumers) != 1 or not _is_right(fold, call.consumers[0]):
            users = [user.module or getattr(user.function, "__name__", str(user.function)) for user in call.consumers]
            raise InvalidInputError(
                f"layer `{fold.into}`: expected that its output only goes to the {_kind(fold)} that is folded into it, "
                f"as on the batch that decided the folds, got {', '.join(users) or 'no use'} on this one; "
                f"fold with a batch like this"
            )


def _is_right(fold: Fold, user: Consumer) -> bool:
    return user.module == fold.module if fold.kind == "batch_norm" else user.relu == fold.kind


def _check_norm(fold: Fold, calls: list[Call], seen: Recording, layer: Any) -> None:
    norm_calls = seen.calls[fold.module]
    if len(norm_calls) != len(calls):
        raise InvalidInputError(
            f"layer `{fold.into}`: expected that the {_kind(fold)} that is folded into it only takes its output, "
            f"got {len(norm_calls)} calls after {len(calls)} of the layer; fold with a batch like this"
        )
    if fold.into in seen.read:
        raise InvalidInputError(
            f"layer `{fold.into}`: expected that no other function uses its weights, which contain the {_kind(fold)}, "
            f"got one on this batch; fold with a batch like this"
        )
    if any(call.output_ndim != layer.weight.ndim for call in calls):
        raise InvalidInputError(
            f"layer `{fold.into}`: expected outputs of {layer.weight.ndim} dimensions, as on the batch that decided to "
            f"fold the {_kind(fold)} into it, got another number"
        )


def _kind(fold: Fold) -> str:
    return f"BatchNorm `{fold.module}`" if fold.kind == "batch_norm" else {"relu": "ReLU", "relu6": "ReLU6"}[fold.kind]
