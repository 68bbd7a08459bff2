"""What really consumed a layer's output, recorded in one run of the model.

The order in which attributes were registered tells nothing about the order of calls, and many models cannot be
traced symbolically. So one batch is run with hooks on the modules and a torch-function mode that sees everything
else that touches a tensor.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .functions import METADATA, product_name, relu_kind
from .hooks import active
from .layers import RELUS, WEIGHTED
from .norms import is_foldable

_FILL = 1e4  # masks are filled with -1e4, -1e9, the lowest value of a dtype
OUTPUT = "output"  # stands for the model's own output among the consumers


class Consumer(NamedTuple):
    """Who used a tensor: a module of interest by its qualified name, or a function."""

    module: str | None
    function: Any = None
    relu: str = ""
    """`relu` or `relu6` where the function is one."""


class Call(NamedTuple):
    """One call of a module of interest."""

    module: str
    output_ndim: int
    consumers: list[Consumer]


class Recording(NamedTuple):
    """What a run of a model showed."""

    calls: dict[str, list[Call]]
    """The calls of each layer, BatchNorm and ReLU module; empty where it was not called."""
    output: list[torch.Tensor]
    """The tensors that the model returned."""
    products: dict[str, list[str]]
    """Functions that multiply weights or activations outside the layers, by the innermost module that called them."""
    read: set[str]
    """The modules of interest whose parameters something else used."""


def record_calls(model: nn.Module, run: Callable[[], Any]) -> Recording:
    """Run the model and return who used the output of what. The model is left as it was."""
    interesting = [name for name, m in model.named_modules() if type(m) in (*WEIGHTED, *RELUS) or is_foldable(m)]
    with torch.no_grad(), recording(model, interesting, products=True) as seen:
        run()
    return seen


@contextmanager
def recording(model: nn.Module, interesting: Iterable[str], *, products: bool = False) -> Iterator[Recording]:
    """Record the calls of the named modules while the context is open; what it yields is complete at the end.

    For `products` every module is hooked, to tell which one multiplied; it takes longer.
    """
    seen = Recording({name: [] for name in interesting}, [], {}, set())
    recorder = _Recorder(seen, model)

    def recorders() -> Iterator[AbstractContextManager[Any]]:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks
            if not name or name in seen.calls or products:
                entering, leaving = recorder.hooks(name)
                yield module.register_forward_pre_hook(entering, with_kwargs=True)
                yield module.register_forward_hook(leaving, always_call=True)
        if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            yield register_module_forward_pre_hook(recorder.entering_script)
        yield recorder

    with active(recorders()):
        yield seen
    recorder.consume(seen.output, Consumer(None, OUTPUT))


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


def outputs_agree(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Tell whether two runs returned the same up to the rounding of their dtype.

    NaN and infinity must be in the same places. The tolerance comes from the finite values, without constants that
    masks are filled with in place of -inf: large values that are exactly the same in both runs.
    """
    return len(got) == len(expected) and all(map(_nearly_equal, got, expected))


def _nearly_equal(got: torch.Tensor, expected: torch.Tensor) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if got.is_complex():
        return _nearly_equal(torch.view_as_real(got.resolve_conj()), torch.view_as_real(expected.resolve_conj()))
    if not got.is_floating_point() or not got.numel():
        return torch.equal(got, expected)
    relative = min(1000 * torch.finfo(got.dtype).eps, 0.05)
    got, expected = got.double(), expected.double()
    same = (got == expected) | (got.isnan() & expected.isnan())
    scale = expected[expected.isfinite() & ~(same & (expected.abs() >= _FILL))].abs()
    off = (got - expected)[~same].abs()  # NaN or infinite where only one of the two is
    return not off.numel() or bool((off <= relative * (scale.max() if scale.numel() else 0.0)).all())


def count_uses(model: nn.Module) -> Counter[int]:
    """Count, by id, how many modules own each parameter: more than one means shared weights."""
    return Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))


class _Recorder(TorchFunctionMode):
    def __init__(self, seen: Recording, model: nn.Module) -> None:
        super().__init__()
        self._seen = seen
        self._owners = {id(p): name for name in seen.calls for p in model.get_submodule(name).parameters()}
        self._entered: list[str] = []
        self._depth = 0  # inside a module of interest nothing is recorded
        # weak, or all activations of a run would stay in memory
        self._produced: dict[int, tuple[weakref.ref[torch.Tensor], Call]] = {}

    def consume(self, values: Iterable[torch.Tensor], consumer: Consumer) -> None:
        for value in values:
            if id(value) in self._owners:
                self._seen.read.add(self._owners[id(value)])
            produced, call = self._produced.get(id(value), (None, None))
            if produced is not None and produced() is value and call is not None:
                call.consumers.append(consumer)

    def hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """Return what is to be called when the module is entered and left."""
        interesting = name in self._seen.calls

        def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
            if interesting and self._depth == 0:
                self.consume(tensors_in((args, kwargs)), Consumer(name))
            self._entered.append(name)
            self._depth += interesting

        def leaving(module: nn.Module, args: Any, output: Any) -> None:
            if self._entered[-1:] != [name]:
                return  # an earlier hook of the module raised an error before it was entered
            self._entered.pop()
            self._depth -= interesting
            if interesting and self._depth == 0:
                self._produce(name, output)
            if name == "":
                self._seen.output.extend(tensors_in(output))

        return entering, leaving

    def entering_script(self, module: nn.Module, args: Any) -> None:
        """Record what TorchScript takes: the calls inside it are not visible."""
        if isinstance(module, torch.jit.ScriptModule) and self._depth == 0:
            self.consume(tensors_in(args), Consumer(None, "TorchScript"))

    def _produce(self, name: str, output: Any) -> None:
        for tensor in tensors_in(output):  # none if the module raised an error
            call = Call(name, tensor.ndim, [])
            self._seen.calls[name].append(call)
            self._produced[id(tensor)] = (weakref.ref(tensor), call)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._depth or func in METADATA:
            return func(*args, **kwargs)
        relu = relu_kind(func, args, kwargs)
        self.consume(tensors_in((args, kwargs)), Consumer(None, func, relu))
        if self._entered and (product := product_name(func)):
            self._seen.products.setdefault(self._entered[-1], []).append(product)
        result = func(*args, **kwargs)
        if relu:
            self._produced.pop(id(result), None)  # changed in place it is no longer what the layer returned
        return result
