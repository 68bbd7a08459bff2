"""What really consumed a layer's output, recorded in one run of the model.

The order in which attributes were registered tells nothing about the order of calls, and many models cannot be
traced symbolically. So one batch is run with hooks on the modules of interest and a torch-function mode that
sees everything else that touches a tensor.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .layers import BATCH_NORMS, RELUS, WEIGHTED

# reading these does not use the values of a tensor
_METADATA = {
    getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout")
} | {
    getattr(torch.Tensor, name)
    for name in ("size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "__len__")
}
OUTPUT = "output"  # stands for the model's own output among the consumers


class Consumer(NamedTuple):
    """Who used a tensor: a module of interest by its qualified name, or a function."""

    module: str | None
    function: Any = None


class Call(NamedTuple):
    """One call of a module of interest."""

    module: str
    output_ndim: int
    consumers: list[Consumer]


class Recording(NamedTuple):
    """What one run of a model showed."""

    calls: dict[str, list[Call]]
    """The calls of each layer, BatchNorm and ReLU module; empty where it was not called."""
    output: list[torch.Tensor]
    """The tensors that the model returned."""


def record_calls(model: nn.Module, run: Callable[[], Any]) -> Recording:
    """Run the model and return who used the output of what. The model is left as it was."""
    recorder = _Recorder()
    output: list[torch.Tensor] = []
    interesting = {name: m for name, m in model.named_modules() if type(m) in (*WEIGHTED, *BATCH_NORMS, *RELUS)}

    def returned(module: nn.Module, args: Any, result: Any) -> None:
        output.extend(tensors_in(result))

    handles = [model.register_forward_hook(returned)]
    try:
        for name, module in interesting.items():
            handles.append(module.register_forward_pre_hook(recorder.entering(name), with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.leaving(name), always_call=True))
        with torch.no_grad(), recorder:
            run()
    finally:
        for handle in handles:
            handle.remove()
    recorder.consume(output, Consumer(None, OUTPUT))
    calls: dict[str, list[Call]] = {name: [] for name in interesting}
    for call in recorder.calls:
        calls[call.module].append(call)
    return Recording(calls, output)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers, and in the attributes of plain objects such as dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
        yield from tensors_in(list(vars(value).values()))


def count_uses(model: nn.Module) -> Counter[int]:
    """Count, by id, how many modules own each parameter: more than one means shared weights."""
    return Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._depth = 0  # inside a module of interest nothing is recorded
        self._produced: dict[int, tuple[torch.Tensor, Call]] = {}  # the tensor is kept so that its id stays its own

    def consume(self, values: Iterable[torch.Tensor], consumer: Consumer) -> None:
        for value in values:
            if id(value) in self._produced:
                self._produced[id(value)][1].consumers.append(consumer)

    def entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._depth == 0:
                self.consume(tensors_in((args, kwargs)), Consumer(name))
            self._depth += 1

        return hook

    def leaving(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._depth -= 1
            for tensor in tensors_in(output):  # none if the module raised an error
                call = Call(name, tensor.ndim, [])
                self.calls.append(call)
                self._produced[id(tensor)] = (tensor, call)

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._depth == 0 and func not in _METADATA:
            self.consume(tensors_in((args, kwargs)), Consumer(None, func))
        return func(*args, **(kwargs or {}))
