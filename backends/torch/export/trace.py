"""Trace a simulated model to ONNX with torch's exporter, with a mark wherever it rounds an activation."""

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from klquant.errors import InvalidInputError, ModelError

from ..model.arguments import Arguments
from ..model.edits import copy_model
from ..model.layers import LayerWrapper
from ..simulation import QuantizedLayer, quantized_layers, rounded_layers

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN, ROUNDED, KEPT = "klquant", "Rounded", "Kept"  # names of the marks, which no engine implements
ROOT = "model"  # prefix of traced names
DynamicShapes: TypeAlias = Mapping[str, Mapping[int, str]]
_IRRELEVANT: list[tuple[str, type[Warning]]] = [
    ("", FutureWarning),  # torch's exporter uses deprecated functions of torch
    ("", DeprecationWarning),
    ("# The axis name: .* will not be used, since it shares", UserWarning),  # it is used
    (
        "The tensor attribute.* assigned during export",
        UserWarning,
    ),  # recurrent layers do, here in a copy
]


class Traced(NamedTuple):
    """A simulated model as torch exports it."""

    model: "ir.Model"
    """A float model with marks: ``klquant.Rounded`` where an activation is rounded, and ``klquant.Kept`` after a layer,
    so that nothing is folded into its weights, which are rounded already."""
    layers: list[str]
    """Names of the quantized layers."""
    inputs: dict[str, str]
    """Input names, by argument name."""
    initializers: dict[str, str]
    """Parameter names in the user's model, by initializer name."""
    named_outputs: bool
    """Whether the user named the outputs."""


class _MarkedLayer(QuantizedLayer):
    """Emits a mark with name, scale and place instead of rounding."""

    mark: dict[str, Any]

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return _mark(ROUNDED, x, self.mark)


def _mark(kind: str, x: torch.Tensor, attributes: dict[str, Any]) -> torch.Tensor:
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{kind}", (x,), attributes, dtype=x.dtype, shape=list(x.shape), version=1)


def _mark_kept(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return _mark(KEPT, output, {})


class _Called(nn.Module):
    """Takes the tensors of an example as one list, so that shapes can be given in one form for any signature."""

    def __init__(self, model: nn.Module, example: Arguments) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._form = tree_flatten((example.args, example.kwargs))
        self.eval()

    def tensors(self) -> list[torch.Tensor]:
        """Return the tensors of the example."""
        return [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]

    def forward(self, tensors: list[torch.Tensor]) -> Any:
        """Call the model with these tensors in place of those of the example."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._form)
        return self.model(*args, **kwargs)


def trace(
    model: nn.Module,
    example: Arguments,
    *,
    dynamic_batch: bool,
    dynamic_shapes: DynamicShapes,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Traced:
    """Return the model as ONNX; raise ModelError if torch fails."""
    arguments = list(named_tensors(model, example))
    inputs = list(input_names or arguments)
    if len(inputs) != len(arguments):
        raise InvalidInputError(f"`input_names` must name {len(arguments)} tensors, {arguments}, got {inputs}")
    marked = _with_marks(model)
    called = _Called(marked, example)
    shapes = _shapes(dict(zip(inputs, called.tensors(), strict=True)), dynamic_batch, dynamic_shapes)
    with _quiet():
        try:
            program: Any = torch.onnx.export(  # Any: it is None only without dynamo
                called,
                (called.tensors(),),
                dynamo=True,
                verbose=False,
                input_names=inputs,
                output_names=output_names,
                dynamic_shapes=(shapes,) if any(shapes) else None,
            )
        except Exception as error:
            cause = error.__cause__ or error
            reason = str(cause).strip().partition("\n\n")[0]
            reason += _advice(reason)
            raise ModelError(f"torch cannot export the model, with {type(cause).__name__}: {reason}") from error
    traced = program.model
    names = _plain_names(marked, traced.graph.initializers)
    layers = list(quantized_layers(model))
    return Traced(traced, layers, dict(zip(arguments, inputs, strict=True)), names, output_names is not None)


def _advice(reason: str) -> str:
    """Return what to change if an output is a cache of keys and values, as transformers' generative models return."""
    if not re.search(r"Found <class '[\w.]*Cache'> in output", reason):
        return ""
    return '; the model returns its cache, which ONNX cannot hold: pass use_cache=False, in a batch "use_cache": False'


def _with_marks(model: nn.Module) -> nn.Module:
    model = copy_model(model).requires_grad_(requires_grad=False)
    for layer in {id(layer): layer for _, layer, _ in rounded_layers(model)}.values():
        layer.register_forward_hook(_mark_kept)
    for name, layer in quantized_layers(model).items():
        layer.__class__ = _MarkedLayer
        layer.__dict__["mark"] = {"layer": name, "scale": layer.scale.item(), "observe": layer.observe}
    return model


def named_tensors(model: nn.Module, arguments: Arguments) -> dict[str, torch.Tensor]:
    """Return the tensors among arguments by name, with a number if an argument holds several."""
    args, kwargs = arguments.args, arguments.kwargs
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [name for name, one in inspect.signature(model.forward).parameters.items() if one.kind in kinds]
    known += [f"input_{k}" if k else "input" for k in range(len(known), len(args))]
    tensors: dict[str, torch.Tensor] = {}
    for name, value in {**dict(zip(known, args, strict=False)), **kwargs}.items():
        found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        tensors |= {name if len(found) == 1 else f"{name}_{k}": tensor for k, tensor in enumerate(found)}
    return tensors


def _shapes(
    tensors: Mapping[str, torch.Tensor], dynamic_batch: bool, given: DynamicShapes
) -> list[dict[int, Any] | None]:
    """Return the dynamic dimensions of each tensor: those given, and the batch size.

    The batch size is dimension 0 of the first tensor, and of the tensors with as many samples.
    """
    samples = next((len(x) for x in tensors.values() if x.ndim), None) if dynamic_batch else None
    _check_shapes(tensors, given)
    shapes: dict[str, dict[int, str]] = {
        name: {0: "batch"} if x.ndim and len(x) == samples else {} for name, x in tensors.items()
    }
    for name, axes in given.items():
        shapes[name] |= {axis % tensors[name].ndim: size for axis, size in axes.items()}
    sizes = {size: torch.export.Dim(size) for axes in shapes.values() for size in axes.values()}
    return [{axis: sizes[size] for axis, size in axes.items()} or None for axes in shapes.values()]


def _check_shapes(tensors: Mapping[str, torch.Tensor], given: DynamicShapes) -> None:
    if unknown := given.keys() - tensors.keys():
        raise InvalidInputError(f"`dynamic_shapes` must name inputs, {list(tensors)}, got {sorted(unknown)}")
    for name, axes in given.items():
        for axis, size in axes.items():
            if not isinstance(axis, int) or not -tensors[name].ndim <= axis < tensors[name].ndim:
                raise InvalidInputError(
                    f"`dynamic_shapes` of `{name}` must be dimensions of a tensor of {tensors[name].ndim}, got {axis!r}"
                )
            if not isinstance(size, str) or not size.isidentifier():
                raise InvalidInputError(f"`dynamic_shapes` of `{name}` must map to names of sizes, got {size!r}")


def _plain_names(model: nn.Module, traced: Iterable[str]) -> dict[str, str]:
    """Return the names of traced parameters in the user's model, which has no wrappers around layers."""
    wrappers = [name for name, module in model.named_modules(prefix=ROOT) if isinstance(module, LayerWrapper)]
    names = {}
    for name in traced:
        plain = name
        for wrapper in reversed(wrappers):  # inner ones first
            if plain.startswith(f"{wrapper}.layer."):
                plain = wrapper + plain.removeprefix(f"{wrapper}.layer")
        names[name] = plain.removeprefix(f"{ROOT}.")
    return names


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress output of torch's exporter, and warnings that do not concern the user."""
    logger = logging.getLogger("torch")
    level, dropped = logger.level, io.StringIO()
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(dropped), contextlib.redirect_stderr(dropped):
            for message, category in _IRRELEVANT:
                warnings.filterwarnings("ignore", message, category)
            yield
    finally:
        logger.setLevel(level)
