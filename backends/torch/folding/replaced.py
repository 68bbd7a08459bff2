"""Check that what `layer_types` puts in the place of modules computes the same."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from klquant.errors import InvalidInputError

from ..model.dataflow import outputs_agree, tensors_in
from ..model.edits import restored
from ..model.forward import Forward


def check_replaced(
    model: nn.Module, replaced: nn.Module, batch: Any, forward: Forward, classes: Mapping[type[nn.Module], Any]
) -> None:
    """Raise InvalidInputError if the model returns something else with the replaced modules, and not at random."""

    def run(which: nn.Module) -> list[torch.Tensor]:
        with restored(which), torch.no_grad():
            return list(tensors_in(forward(which, batch)))

    expected = run(model)
    if not outputs_agree(run(replaced), expected) and outputs_agree(run(model), expected):
        names = ", ".join(sorted(kind.__name__ for kind in classes))
        raise InvalidInputError(
            f"`layer_types` must return modules that compute what those of {names} compute, got others: "
            "the output of the model differs on the first batch"
        )
