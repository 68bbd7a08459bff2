"""Modules of torch.export: turn the operations of their graph back into layers, in a copy."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from klquant.errors import InvalidInputError

_CONVOLUTIONS = {f"conv{rank}d": kind for rank, kind in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1)}
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def is_exported(module: nn.Module) -> bool:
    """Return whether this is the module of an exported program, which has no eval mode."""
    return any(kind.__name__ == "_StatefulGraphModule" for kind in type(module).__mro__)  # also of a copy


def make_layers(model: nn.Module) -> None:
    """Call layers in place of the operations in every exported program; raise if one was exported in training mode."""
    for name, module in list(model.named_modules()):
        if is_exported(module):
            for inner in module.modules():
                inner.training = False
            _rewrite(name, module)


def _rewrite(name: str, program: Any) -> None:
    for node in list(program.graph.nodes):
        operation = getattr(node.target, "_opname", "") if node.op == "call_function" else ""
        if operation == "batch_norm" and node.args[5]:
            raise InvalidInputError(
                f"expected a program that was exported in eval mode, got `{name}` with a BatchNorm in training mode; "
                f"call model.eval() before torch.export"
            )
        make = _MAKERS.get(operation)
        layer = make(program, node) if make else None
        if layer is not None:
            _call(program, node, layer)
    program.graph.eliminate_dead_code()
    program.recompile()


def _call(program: Any, node: Any, layer: nn.Module) -> None:
    """Put the layer in the place of the module that held its weights, and call it."""
    holder = _parameter(node.args[1]).rpartition(".")[0] if len(node.args) > 1 else node.name
    parent, _, key = holder.rpartition(".")
    program.get_submodule(parent).add_module(key, layer.eval())
    with program.graph.inserting_before(node):
        called = program.graph.call_module(holder, (node.args[0],))
    called.meta = node.meta
    node.replace_all_uses_with(called)
    program.graph.erase_node(node)


def _parameter(node: Any) -> str:
    """Return the qualified name of the parameter that a node reads; empty if it computes something else."""
    if getattr(node, "op", "") == "get_attr":
        return str(node.target)
    return ""


def _own(program: Any, *nodes: Any) -> list[Any] | None:
    """Return the parameters if one module holds them all, for nothing else in the graph."""
    names = [_parameter(node) for node in nodes if node is not None]
    holders = {name.rpartition(".")[0] for name in names}
    if not all(names) or len(holders) != 1 or not (holder := holders.pop()):
        return None
    module = program.get_submodule(holder)
    readers = [node for node in program.graph.nodes if _parameter(node).rpartition(".")[0] == holder and node.users]
    if module._modules or type(module) is not nn.Module or any(len(node.users) != 1 for node in readers):
        return None
    values = iter(getattr(module, name.rpartition(".")[2]) for name in names)
    return [None if node is None else next(values) for node in nodes]


def _linear(program: Any, node: Any) -> nn.Module | None:
    found = _own(program, node.args[1], node.args[2] if len(node.args) > 2 else None)
    if found is None:
        return None
    layer = nn.Linear(found[0].shape[1], found[0].shape[0], bias=found[1] is not None, device="meta")
    layer.weight, layer.bias = found
    return layer


def _convolution(program: Any, node: Any) -> nn.Module | None:
    found = _own(program, node.args[1], node.args[2] if len(node.args) > 2 else None)
    if found is None:
        return None
    kind: Any = _CONVOLUTIONS[node.target._opname]
    rank = found[0].ndim - 2
    given = dict(zip(("stride", "padding", "dilation", "groups"), node.args[3:], strict=False))
    options = {key: value if isinstance(value, (str, int)) else _full(value, rank) for key, value in given.items()}
    outputs, inputs, *size = found[0].shape
    inputs *= given.get("groups", 1)
    layer = kind(inputs, outputs, tuple(size), bias=found[1] is not None, device="meta", **options)
    layer.weight, layer.bias = found
    return layer  # type: ignore[no-any-return]


def _full(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(value) * rank if len(value) == 1 else tuple(value)


def _norm(program: Any, node: Any) -> nn.Module | None:
    value = node.meta.get("val")
    found = _own(program, *node.args[1:5])
    if found is None or value is None or value.ndim not in _NORMS or any(tensor is None for tensor in found):
        return None
    layer: Any = _NORMS[value.ndim](len(found[2]), eps=node.args[7], device="meta")
    layer.weight, layer.bias, layer.running_mean, layer.running_var = found
    layer.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    return layer  # type: ignore[no-any-return]


_MAKERS: dict[str, Callable[[Any, Any], nn.Module | None]] = {
    "linear": _linear,
    "batch_norm": _norm,
    **dict.fromkeys(_CONVOLUTIONS, _convolution),
}
