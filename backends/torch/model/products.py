"""Products that a model computes by functions: matmul, einsum, attention, F.linear, ...; made modules to observe.

Residual sums are handled in the same way; :mod:`sums` finds them.

A :class:`Product` names one call of a function in a module, such as the second matmul of an attention block. Installed,
the module's ``forward`` sends that call through a :class:`Point`, which passes each operand through a :class:`Tap`: an
identity that is observed, and replaced in a simulation, like a layer. So
``encoder.layer.0.attention:matmul.1.other`` is a name like that of a layer.
"""

import functools
import inspect
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .functions import ADD, addition_kind, product_name
from .layers import Tap

ATTENTION = "scaled_dot_product_attention"
_ATTENTION_OPERANDS = ("query", "key", "weights", "value")
_PAIR = ("input", "other")
_WEIGHTED = {"linear", *(f"{kind}{rank}d" for kind in ("conv", "conv_transpose") for rank in (1, 2, 3))}
_OPERANDS: dict[str, tuple[tuple[int, str], tuple[int, str]]] = {
    **dict.fromkeys(_WEIGHTED, ((0, "input"), (1, "weight"))),
    **dict.fromkeys(("matmul", ADD), ((0, "input"), (1, "other"))),
    **dict.fromkeys(("mm", "bmm"), ((0, "input"), (1, "mat2"))),
    "addmm": ((1, "mat1"), (2, "mat2")),
    **dict.fromkeys(("baddbmm", "addbmm"), ((1, "batch1"), (2, "batch2"))),
    "einsum": ((1, ""), (2, "")),
}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, torch.fx.GraphModule)  # iterate over, or copy, their parts


class Product(NamedTuple):
    """One call of a function that multiplies, or of a residual sum, in one call of a module: strings and numbers."""

    module: str
    """Qualified name of the module that calls it."""
    function: str
    number: int
    """How many calls of this function in the module came before."""
    activations: str
    """The operands that depend on the input of the model, such as `input other`."""
    weight: str = ""
    """Qualified names of the parameters that the other operand is computed from; in a sum, of its layer's weight."""

    @property
    def names(self) -> list[str]:
        """Return the names of the operands that are observed."""
        return [f"{self.module}:{self.function}.{self.number}.{operand}" for operand in self.activations.split()]

    @property
    def owners(self) -> list[str]:
        """Return the qualified names of the modules that own the parameters."""
        return [name.rpartition(".")[0] for name in self.weight.split()]

    def joined(self, other: "Product") -> "Product":
        """Return this call with the operands that are activations in another call of the module as well."""
        found = dict.fromkeys([*self.activations.split(), *other.activations.split()])
        return self._replace(activations=" ".join(found), weight=self.weight if self.weight == other.weight else "")


def operands_of(function: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the operands of a call by name; empty if it has others than tensors, or not two."""
    if function == ADD and (len(args) > 2 or kwargs.keys() - {*_PAIR}):
        return {}  # a factor
    if function == ATTENTION:
        names = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        found = {name: names.get(name) for name in ("query", "key", "value")}
    elif function in _OPERANDS:
        if function == "einsum" and len(args) == 2 and isinstance(args[1], (list, tuple)):
            args = (args[0], *args[1])
        if function == "einsum" and len(args) != 3:
            return {}
        places = zip(_PAIR, _OPERANDS[function], strict=True)
        found = {name: args[k] if len(args) > k else kwargs.get(key) for name, (k, key) in places}
    else:
        return {}
    floats = all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in found.values())
    return found if floats else {}  # type: ignore[return-value]


def observed_operands(function: str, activations: Iterable[str]) -> str:
    """Return what is observed of a product whose operands with these names depend on the input of the model."""
    found = list(activations)
    return " ".join(_ATTENTION_OPERANDS if function == ATTENTION and found else found)


def can_own(module: nn.Module) -> bool:
    """Return whether points can be added to a module, which must not iterate over its parts."""
    return not isinstance(module, (*_CONTAINERS, torch.jit.ScriptModule))


def install(model: nn.Module, products: Iterable[Product]) -> None:
    """Send these calls of a model that the caller owns through points."""
    products = list(products)
    _hide_what_is_inside([model.get_submodule(product.module) for product in products])
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    for product in products:
        owner = model.get_submodule(product.module)
        key = f":{product.function}"
        if key not in owner._modules:
            owner.add_module(key, nn.Module().eval())
        sources = [model.get_submodule(name) for name in product.owners]
        point = Point(product.function, product.activations.split(), sources, device)
        owner._modules[key].add_module(str(product.number), point)  # type: ignore[union-attr]
        if not isinstance(vars(owner).get("forward"), Routed):
            vars(owner)["forward"] = Routed(owner)


def _hide_what_is_inside(owners: Iterable[nn.Module]) -> None:
    """Let the routers of these modules see only what they call themselves, not what modules inside them call."""
    inside = {id(module): module for owner in owners for module in owner.modules() if module is not owner}
    for module in inside.values():
        if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks
            hide(module)


def hide(module: nn.Module) -> None:
    """Hide what a module computes from the routers of the modules around it."""
    module.register_forward_pre_hook(_enter)
    module.register_forward_hook(_leave, always_call=True)


class Point(nn.Module):
    """A call of a function, with a tap for each operand that is observed."""

    def __init__(
        self, function: str, activations: Sequence[str], sources: list[nn.Module], device: torch.device
    ) -> None:
        super().__init__()
        self.function, self.sources = function, sources
        for name in activations:
            self.add_module(name, Tap(device))
        self.eval()

    def call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Call the function with its operands passed through the taps, and its weight rounded if they round."""
        if self.function == ATTENTION:
            return self._attend(*args, **kwargs)
        given, args, kwargs = args, list(args), dict(kwargs)
        if self.function == "einsum" and isinstance(args[1], (list, tuple)):
            args = [args[0], *args[1]]
        for number, (name, (k, key)) in enumerate(zip(_PAIR, _OPERANDS[self.function], strict=True)):
            place: Any = (args, k) if len(args) > k else (kwargs, key)
            place[0][place[1]] = self._through(name, number, place[0][place[1]])
        result = func(*args, **kwargs)
        in_place = self.function == ADD and args and result is args[0] is not given[0]
        return given[0].copy_(result) if in_place else result

    def _through(self, name: str, number: int, value: torch.Tensor) -> torch.Tensor:
        tap: Any = self._modules.get(name)
        if tap is not None:
            return tap(value)  # type: ignore[no-any-return]
        if self.function == ADD:
            return value
        rounding = [layer for layer in self._modules.values() if hasattr(layer, "round_weight")]
        if not rounding:
            return value
        return rounding[0].round_weight(value, _weight_axis(self.function, number, value.ndim))  # type: ignore

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Compute attention by its two products; there is no dropout in eval mode."""
        taps: Any = self._modules
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        scores = taps["query"](query) @ taps["key"](key.mT)
        scores *= query.shape[-1] ** -0.5 if scale is None else scale
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.softmax(-1)
        if attn_mask is not None and not torch.compiler.is_exporting():  # there it would cost time in the engine
            weights = weights.nan_to_num(0.0)  # rows that are masked throughout
        return taps["weights"](weights) @ taps["value"](value)  # type: ignore[no-any-return]


def _weight_axis(function: str, number: int, ndim: int) -> int | None:
    """Return the axis of a constant operand that holds the channels of the result."""
    if function in _WEIGHTED:
        return int("transpose" in function)
    if function == "einsum" or ndim < 2:
        return None
    return -1 if number else -2


class Routed:
    """Takes the place of a module's ``forward``, and sends products that the module calls itself through its points."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.before = module, vars(module).get("forward")

    @property
    def __signature__(self) -> inspect.Signature:
        """Return the signature of the module's own ``forward``."""
        return inspect.signature(self._forward)

    @property
    def __code__(self) -> Any:
        """Return the code of the module's own ``forward``, which torch.export names."""
        return (self.before or type(self.module).forward).__code__

    @property
    def _forward(self) -> Any:
        return self.before or functools.partial(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own ``forward``."""
        with _Router(self.module):
            return self._forward(*args, **kwargs)


class _Router(TorchFunctionMode):
    """Sends products and sums to the points of one module during one call, but not those of modules inside it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._points = {key[1:]: group._modules for key, group in module._modules.items() if key[0] == ":" and group}
        self._counts: Counter[str] = Counter()
        self.depth = 0  # of the modules inside that are running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = "" if self.depth else product_name(func) or (addition_kind(func) and ADD)
        point = self._point(name, args, kwargs)
        return func(*args, **kwargs) if point is None else point.call(func, args, kwargs)

    def _point(self, function: str, args: Any, kwargs: Any) -> Any:
        points: Any = self._points.get(function)
        if points is None or not operands_of(function, args, kwargs):
            return None
        self._counts[function] += 1
        return points.get(str(self._counts[function] - 1))


def _enter(module: nn.Module, args: Any) -> None:
    """Note that the modules around this one do not run themselves."""
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, _Router):
            mode.depth += 1


def _leave(module: nn.Module, args: Any, output: Any) -> None:
    for mode in _get_current_function_mode_stack():
        if isinstance(mode, _Router):
            mode.depth -= 1
