"""Trace a simulated model to ONNX with torch's own exporter, with a mark wherever it rounds an activation."""

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from klquant.errors import InvalidInputError, ModelError

from ..model.edits import copy_model
from ..model.layers import LayerWrapper, inner_layer
from ..simulation import QuantizedLayer, quantized_layers

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN, ROUNDED, KEPT = "klquant", "Rounded", "Kept"  # operators that are none: marks
ROOT = "model"  # of the names of what is traced
_IRRELEVANT: list[tuple[str, type[Warning]]] = [
    ("", FutureWarning),  # torch's exporter uses what torch deprecates
    ("", DeprecationWarning),
    ("# The axis name: batch will not be used, since it shares", UserWarning),  # it is used
    ("The tensor attribute.* assigned during export", UserWarning),  # of a copy; recurrent layers do
]


class Traced(NamedTuple):
    """What torch's exporter made of a simulated model."""

    model: "ir.Model"
    """In floating point; ``klquant.Rounded`` stands where an activation is rounded, ``klquant.Kept`` behind a layer, so
    that nothing is folded into its weights: they are rounded already."""
    layers: list[str]
    """Names of the quantized layers."""
    inputs: dict[str, str]
    """What the inputs are called, by names of the arguments."""
    initializers: dict[str, str]
    """What the initializers are called in the user's model, by their names in this one."""
    named_outputs: bool
    """Whether a person named the outputs."""


class _MarkedLayer(QuantizedLayer):
    """Leaves a mark instead of rounding, with its name, scale and place."""

    mark: dict[str, Any]

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return _mark(ROUNDED, x, self.mark)


def _mark(kind: str, x: torch.Tensor, said: dict[str, Any]) -> torch.Tensor:
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{kind}", (x,), said, dtype=x.dtype, shape=list(x.shape), version=1)


def _mark_kept(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return _mark(KEPT, output, {})


class _Called(nn.Module):
    """Takes the tensors of an example as one list, whatever its form: so their shapes can be told for any signature."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._form = tree_flatten(as_arguments(example))
        self.eval()

    def tensors(self) -> list[torch.Tensor]:
        """Return those of the example."""
        return [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]

    def forward(self, tensors: list[torch.Tensor]) -> Any:
        """Call the model with these in the place of the example's."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._form)
        return self.model(*args, **kwargs)


def trace(
    model: nn.Module,
    example: Any,
    *,
    dynamic_batch: bool,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Traced:
    """Return the model as ONNX; errors of torch become a ModelError."""
    arguments = list(named_tensors(model, example))
    inputs = list(input_names or arguments)
    if len(inputs) != len(arguments):
        raise InvalidInputError(f"`input_names` must name {len(arguments)} tensors, {arguments}, got {inputs}")
    marked = _with_marks(model)
    called = _Called(marked, example)
    shapes = _shapes(called.tensors()) if dynamic_batch else None
    with _quiet():
        try:
            program: Any = torch.onnx.export(  # Any: None only without dynamo
                called,
                (called.tensors(),),
                dynamo=True,
                verbose=False,
                input_names=inputs,
                output_names=output_names,
                dynamic_shapes=shapes,
            )
        except Exception as error:
            cause = error.__cause__ or error
            reason = str(cause).strip().partition("\n\n")[0]
            raise ModelError(f"torch cannot export the model, with {type(cause).__name__}: {reason}") from error
    traced = program.model
    names = _plain_names(marked, traced.graph.initializers)
    layers = list(quantized_layers(model))
    return Traced(traced, layers, dict(zip(arguments, inputs, strict=True)), names, output_names is not None)


def _with_marks(model: nn.Module) -> nn.Module:
    model = copy_model(model).requires_grad_(requires_grad=False)
    for name, layer in quantized_layers(model).items():
        inner_layer(layer.layer).register_forward_hook(_mark_kept)
        layer.__class__ = _MarkedLayer
        layer.__dict__["mark"] = {"layer": name, "scale": layer.scale.item(), "observe": layer.observe}
    return model


def as_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments, as :func:`call_model` passes them."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)), {}


def named_tensors(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a batch by name of the argument, numbered where it holds several."""
    args, kwargs = as_arguments(batch)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [name for name, one in inspect.signature(model.forward).parameters.items() if one.kind in kinds]
    known += [f"input_{k}" if k else "input" for k in range(len(known), len(args))]
    tensors: dict[str, torch.Tensor] = {}
    for name, value in {**dict(zip(known, args, strict=False)), **kwargs}.items():
        found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        tensors |= {name if len(found) == 1 else f"{name}_{k}": tensor for k, tensor in enumerate(found)}
    return tensors


def _shapes(tensors: list[torch.Tensor]) -> Any:
    """Return which dimensions are dynamic: the first of the first tensor, and of those that have as many samples."""
    samples = next((len(x) for x in tensors if x.ndim), None)
    batch = torch.export.Dim("batch")
    shapes = [{0: batch} if x.ndim and len(x) == samples else None for x in tensors]
    return None if samples is None else (shapes,)


def _plain_names(model: nn.Module, traced: Iterable[str]) -> dict[str, str]:
    """Return what traced parameters are called in the user's model, where there are no wrappers of layers."""
    wrappers = [name for name, module in model.named_modules(prefix=ROOT) if isinstance(module, LayerWrapper)]
    names = {}
    for name in traced:
        plain = name
        for wrapper in reversed(wrappers):  # the inner ones first
            if plain.startswith(f"{wrapper}.layer."):
                plain = wrapper + plain.removeprefix(f"{wrapper}.layer")
        names[name] = plain.removeprefix(f"{ROOT}.")
    return names


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the terminal what torch's exporter tells of itself, and warnings that help nobody."""
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
