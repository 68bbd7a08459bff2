"""Watch that what was folded on one batch is right on every other, whatever branches the model takes."""

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
def watching_folds(folded_model: nn.Module, folds: Iterable[Fold]) -> Iterator[None]:
    """Refuse, at the end of the context, runs in which a folded pair did not follow each other.

    Parameters
    ----------
    folded_model : torch.nn.Module
        The result of :func:`apply_folds`. It is run in the context, once or several times.
    folds : iterable of Fold
        What was applied.

    Raises
    ------
    InvalidInputError
        Naming layer and BatchNorm or ReLU, if the output of a folded layer went to anything but the BatchNorm or a ReLU
        that is folded into it, or the BatchNorm was called without it.

    Notes
    -----
    Enter it after hooks that look at outputs have been registered: what they do must not count as a use. That is what
    :func:`watched` does.
    """
    done = [fold for fold in folds if not fold.reason]
    norms = [fold.module for fold in done if fold.kind == "batch_norm"]
    renewing = (folded_model.get_submodule(name).register_forward_hook(_renew) for name in norms)
    recorded = [*norms, *(str(fold.into) for fold in done)]
    with active(renewing), recording(folded_model, recorded) as seen:
        yield
    _check(folded_model, done, seen)


def watched(forward: Forward, folds: list[Fold]) -> Forward:
    """Return a way to run a folded model that refuses a batch on which the folds are wrong; see `watching_folds`."""

    def run(model: nn.Module, batch: Any) -> Any:
        with watching_folds(model, folds):
            return forward(model, batch)

    return run if any(not fold.reason for fold in folds) else forward


def _renew(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Return the same values as another object, so that later uses of the layer's own output can be told apart."""
    return output.view_as(output)


def _check(model: nn.Module, folds: list[Fold], seen: Recording) -> None:
    last: dict[str, str] = {}  # what returns the output of a layer, after the BatchNorms that were folded into it
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
                f"layer `{fold.into}`: expected that its output goes to the {_kind(fold)} that is folded into it and "
                f"nowhere else, as on the batch that decided the folding, got {', '.join(users) or 'no use'} on this "
                f"one; decide on a batch that shows this"
            )


def _is_right(fold: Fold, user: Consumer) -> bool:
    return user.module == fold.module if fold.kind == "batch_norm" else user.relu == fold.kind


def _check_norm(fold: Fold, calls: list[Call], seen: Recording, layer: Any) -> None:
    norm_calls = seen.calls[fold.module]
    if len(norm_calls) != len(calls):
        raise InvalidInputError(
            f"layer `{fold.into}`: expected that the {_kind(fold)} that is folded into it takes its output and nothing "
            f"else, got {len(norm_calls)} calls after {len(calls)} of the layer; decide on a batch that shows this"
        )
    if fold.into in seen.read:
        raise InvalidInputError(
            f"layer `{fold.into}`: expected that its weights, with the {_kind(fold)} folded into them, are used by no "
            f"other function, got one on this batch; decide on a batch that shows this"
        )
    if any(call.output_ndim != layer.weight.ndim for call in calls):
        raise InvalidInputError(
            f"layer `{fold.into}`: expected outputs of {layer.weight.ndim} dimensions, as on the batch that decided to "
            f"fold the {_kind(fold)} into it, got others"
        )


def _kind(fold: Fold) -> str:
    return f"BatchNorm `{fold.module}`" if fold.kind == "batch_norm" else {"relu": "ReLU", "relu6": "ReLU6"}[fold.kind]
