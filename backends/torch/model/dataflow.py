"""What consumed a layer's output in one run of the model.

The order in which modules were registered need not be the order of their calls, and many models cannot be traced
symbolically. So the model runs on one batch, with hooks on its modules and a torch-function mode that sees every
other function of a tensor.
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

from .constants import Constants
from .functions import ADD, METADATA, addition_kind, product_name, relu_kind
from .hooks import active
from .layers import RELUS, is_quantizable
from .levels import Levels
from .norms import is_foldable
from .products import Product, observed_operands, operands_of

OUTPUT = "output"  # the consumer of what the model returns
_FILL = 9e3  # masks are filled with -1e4 (-9984 in bfloat16), -1e9, the lowest value of a dtype


class Consumer(NamedTuple):
    """What used a tensor: a module of interest, by its qualified name, or a function."""

    module: str | None
    function: Any = None
    relu: str = ""
    """`relu` or `relu6` if the function is one."""


class Call(NamedTuple):
    """One call of a module of interest."""

    module: str
    output_ndim: int
    consumers: list[Consumer]


class Operand(NamedTuple):
    """An operand of a sum."""

    call: Call | None
    """The call of the module whose output it is."""
    level: int
    """The largest number of layers on a path to it."""


class Addition(NamedTuple):
    """A sum of two tensors that depend on the input of the model."""

    module: str
    """Qualified name of the module that adds."""
    number: int
    """How many sums in this call of the module came before."""
    times: int
    """How often it was computed in this run of the model, this time included."""
    operands: dict[str, Operand]


class Recording(NamedTuple):
    """The dataflow of one run of a model."""

    calls: dict[str, list[Call]]
    """The calls of each layer, BatchNorm and ReLU module; empty if it was not called."""
    most: Counter[str]
    """The largest number of calls of each in one run of the model, which may run several times."""
    output: list[torch.Tensor]
    """The tensors that the model returned."""
    products: Counter[Product]
    """How often functions multiplied activations outside the layers in one run, with the innermost calling module."""
    unknown: dict[str, list[str]]
    """Functions that multiplied outside the layers in another way, by the innermost calling module."""
    read: set[str]
    """The modules of interest whose parameters were used outside them."""
    additions: list[Addition]
    """Sums of two tensors outside the layers."""
    swapped: set[str]
    """The modules of interest that ran with other tensors than their parameters, as by torch.func.functional_call."""


def record_calls(model: nn.Module, run: Callable[[], Any]) -> Recording:
    """Run the model and return its dataflow. The model stays as it was."""
    interesting = [name for name, module in model.named_modules() if _is_interesting(module)]
    with torch.no_grad(), recording(model, interesting, products=True) as seen:
        run()
    return seen


def _is_interesting(module: nn.Module) -> bool:
    return is_quantizable(module) or type(module) in RELUS or is_foldable(module)


@contextmanager
def recording(model: nn.Module, interesting: Iterable[str], *, products: bool = False) -> Iterator[Recording]:
    """Record the calls of the named modules during the block; the recording is complete when the block has ended.

    With `products` every module gets hooks, to know which one multiplied; this takes longer.
    """
    seen = Recording({name: [] for name in interesting}, Counter(), [], Counter(), {}, set(), [], set())
    recorder = _Recorder(seen, model, Constants(model) if products else None)

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
    """Yield the tensors in nested containers and in the attributes of objects such as dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)) and not callable(value):
        yield from tensors_in(list(vars(value).values()))


def outputs_agree(got: list[torch.Tensor], expected: list[torch.Tensor], relative: float | None = None) -> bool:
    """Return whether two runs returned the same, up to the rounding of their dtype or to a share of the largest value.

    NaN and infinity must be in the same places. The tolerance comes from the finite values, without constants that
    masks are filled with instead of -inf: large values that are exactly the same in both runs.
    """
    pairs = zip(got, expected, strict=False)
    return len(got) == len(expected) and all(_nearly_equal(*pair, relative) for pair in pairs)


def _nearly_equal(got: torch.Tensor, expected: torch.Tensor, relative: float | None) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if got.is_complex():
        got, expected = (torch.view_as_real(tensor.resolve_conj()) for tensor in (got, expected))
        return _nearly_equal(got, expected, relative)
    if not got.is_floating_point() or not got.numel():
        return torch.equal(got, expected)
    relative = min(1000 * torch.finfo(got.dtype).eps, 0.05) if relative is None else relative
    got, expected = got.double(), expected.double()
    same = (got == expected) | (got.isnan() & expected.isnan())
    scale = expected[expected.isfinite() & ~(same & (expected.abs() >= _FILL))].abs()
    off = (got - expected)[~same].abs()  # NaN or infinite where only one of the two is
    return not off.numel() or bool((off <= relative * (scale.max() if scale.numel() else 0.0)).all())


def count_uses(model: nn.Module) -> Counter[int]:
    """Count, by id, how many modules own each parameter; more than one share it."""
    return Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))


class _Recorder(TorchFunctionMode):
    def __init__(self, seen: Recording, model: nn.Module, constants: Constants | None) -> None:
        super().__init__()
        self._seen = seen
        self._owners = {id(p): name for name in seen.calls for p in model.get_submodule(name).parameters()}
        self._entered: list[str] = []
        self._counts: list[Counter[str]] = []  # of the functions that multiply, for each module that is entered
        self._run: Counter[Any] = Counter()  # of what was called in this run of the model
        self._constants = constants
        self._levels, self._entered_at = Levels(), 0
        self._depth = 0  # of modules of interest: nothing is recorded inside them
        # weak references: strong ones would keep all activations of a run in memory
        self._produced: dict[int, tuple[weakref.ref[torch.Tensor], Call]] = {}

    def consume(self, values: Iterable[torch.Tensor], consumer: Consumer) -> None:
        for value in values:
            if id(value) in self._owners:
                self._seen.read.add(self._owners[id(value)])
            if (call := self._call_of(value)) is not None:
                call.consumers.append(consumer)

    def _call_of(self, value: torch.Tensor) -> Call | None:
        """Return the call of a module of interest whose output a tensor is."""
        produced, call = self._produced.get(id(value), (None, None))
        return call if produced is not None and produced() is value else None

    def hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """Return the hooks that are called when the module is entered and left."""
        interesting, follows = name in self._seen.calls, self._constants is not None

        def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
            if interesting and self._depth == 0:
                self.consume(tensors_in((args, kwargs)), Consumer(name))
                if any(id(parameter) not in self._owners for parameter in module.parameters()):
                    self._seen.swapped.add(name)
            if follows and not self._entered:
                self._levels.note((value for value in tensors_in((args, kwargs)) if self._levels.of([value]) < 0), 0)
            if name == "":
                self._run.clear()
            self._entered.append(name)
            self._counts.append(Counter())
            self._depth += interesting
            if follows and interesting and self._depth == 1:
                self._entered_at = self._levels.of(tensors_in((args, kwargs)))

        def leaving(module: nn.Module, args: Any, output: Any) -> None:
            if self._entered[-1:] != [name]:
                return  # it was not entered: one of its own hooks raised an error before
            self._entered.pop()
            self._counts.pop()
            self._depth -= interesting
            if interesting and self._depth == 0:
                self._produce(name, output)
                if follows:
                    self._levels.note(tensors_in(output), self._entered_at + is_quantizable(module))
            if name == "":
                self._seen.output.extend(tensors_in(output))

        return entering, leaving

    def entering_script(self, module: nn.Module, args: Any) -> None:
        """Record what TorchScript takes: the calls inside it are not visible."""
        if isinstance(module, torch.jit.ScriptModule) and self._depth == 0:
            self.consume(tensors_in(args), Consumer(None, "TorchScript"))

    def _produce(self, name: str, output: Any) -> None:
        for tensor in tensors_in(output):  # no tensors if the module raised an error
            call = Call(name, tensor.ndim, [])
            self._seen.calls[name].append(call)
            self._produced[id(tensor)] = (weakref.ref(tensor), call)
            self._seen.most[name] = max(self._seen.most[name], self._times(name))

    def _times(self, key: Any) -> int:
        """Count a call; return how many of this kind there were in this run of the model."""
        self._run[key] += 1
        return self._run[key]

    def _multiply(self, function: str, args: Any, kwargs: Any, constants: Constants) -> None:
        operands, module = operands_of(function, args, kwargs), self._entered[-1]
        varying = [name for name, value in operands.items() if value not in constants]
        number = self._counts[-1][function]
        self._counts[-1][function] += bool(operands)
        if operands and not varying:
            return  # a constant
        if not operands:
            if any(value not in constants for value in tensors_in((args, kwargs))):
                self._seen.unknown.setdefault(module, []).append(function)
            return
        weight = " ".join(dict.fromkeys(name for value in operands.values() for name in constants.sources(value) or ()))
        product = Product(module, function, number, observed_operands(function, varying), weight)
        self._seen.products[product] = max(self._seen.products[product], self._times(product[:3]))

    def _add(self, kind: str, args: Any, kwargs: Any) -> None:
        operands, number = operands_of(ADD, args, kwargs), self._counts[-1][ADD]
        self._counts[-1][ADD] += bool(operands)
        found = {key: Operand(self._call_of(value), self._levels.of([value])) for key, value in operands.items()}
        if found and all(one.level >= 0 for one in found.values()):
            call, level = found["input"]
            if call is not None and kind != ADD:  # later uses of the tensor are uses of the sum
                found["input"] = Operand(call._replace(consumers=[*call.consumers]), level)
            module = self._entered[-1]
            self._seen.additions.append(Addition(module, number, self._times((module, ADD, number)), found))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._depth or func in METADATA:
            return func(*args, **kwargs)
        relu = relu_kind(func, args, kwargs)
        self.consume(tensors_in((args, kwargs)), Consumer(None, func, relu))
        constants = None if torch.compiler.is_dynamo_compiling() else self._constants  # branches, in torch 2.9
        level = 0
        if constants is not None:
            product = product_name(func)
            level = self._levels.of(tensors_in((args, kwargs)))
            level += bool(product) and level >= 0
            if self._entered and product:
                self._multiply(product, args, kwargs, constants)
            elif self._entered and (kind := addition_kind(func)):
                self._add(kind, args, kwargs)
        result = func(*args, **kwargs)
        if constants is not None:
            constants.follow(tensors_in((args, kwargs)), tensors_in(result))
            self._levels.note(tensors_in(result), level)
        if relu:
            self._produced.pop(id(result), None)  # in place: the tensor no longer holds what the layer returned
        return result
