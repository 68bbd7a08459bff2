"""Decide which BatchNorms and ReLUs can be folded into the layer that feeds them, with reasons for the others.

A BatchNorm is folded only if one run of the model shows that it is safe: its layer is called once, the BatchNorm is
called once, and nothing else uses the output of the layer. For a ReLU it is enough that nothing else uses the outputs
of its layer: since relu(relu(x)) = relu(x), the ReLU can stay in place for its other callers.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ...html_tables import html_skipped, html_table
from ...reprs import left_out
from ...settings import Engine, check_engine
from ..model.arguments import log_left_out
from ..model.calls import MOST
from ..model.dataflow import Recording, outputs_agree, record_calls
from ..model.edits import copy_model, restored
from ..model.forward import Forward, call_model, check_eval, naming_errors
from ..model.layers import check_supported, skipped_layers, weighted_layers
from ..model.norms import other_norms
from ..model.plain import LayerTypes, plain_copy
from ..model.products import Product, can_own
from ..model.quantized import check_float
from ..model.sums import residual_sums
from .apply import Fold, fold_in_place
from .decide import all_folds, norm_folds, relu_folds

READ_ELSEWHERE = "it was not called, but other functions read its weights"
SWAPPED = "it runs with other weights than its own, as by torch.func.functional_call"
_IN_DOUBLE = 1e-9  # error of a right fold in float64, relative to the largest output


class Examination(NamedTuple):
    """What one run of a model showed; ``_asdict()``, ``Fold(*...)``, ``Product(*...)`` convert it to JSON and back."""

    folds: list[Fold]
    """One entry for each BatchNorm, and for each layer that can be joined with its ReLU."""
    skipped: dict[str, str]
    """By module name: why something with weights, or that multiplies activations, stays in floating point."""
    products: list[Product]
    """The calls of functions that are observed like layers; for TensorRT, also residual sums, by their shortcut."""
    calls: dict[str, int]
    """Layers, and operands of products, that were called several times: each call is observed apart."""

    def as_rows(self) -> dict[str, list[dict[str, Any]]]:
        """Return how a model is changed, as rows for a calibration; what is skipped is not among them."""
        calls = [{"name": name, "number": number} for name, number in self.calls.items()]
        folds, products = ([row._asdict() for row in rows] for rows in (self.folds, self.products))
        return {"fold": folds, "equalize": [], "products": products, "calls": calls}

    @classmethod
    def from_rows(cls, rows: Mapping[str, list[dict[str, Any]]]) -> "Examination":
        """Return what :meth:`as_rows` returned; older calibrations have no products and calls."""
        folds = [Fold(**row) for row in rows["fold"]]
        products = [Product(**row) for row in rows.get("products", [])]
        return cls(folds, {}, products, {row["name"]: row["number"] for row in rows.get("calls", [])})

    def __repr__(self) -> str:
        """Return the result in one line."""
        folded = sum(not fold.reason for fold in self.folds)
        return f"Examination({folded} of {len(self.folds)} modules can be folded{left_out(self.skipped)})"

    def _repr_html_(self) -> str:
        """Return a table of the folds for notebooks."""
        rows = [(fold.module, fold.kind, fold.into or "", fold.reason) for fold in self.folds]
        return html_table("Folds", ("name", "kind", "into", "reason"), rows) + html_skipped(self.skipped)


def examine(
    model: nn.Module, batch: Any, *, forward: Forward = call_model, engine: Engine | None = None
) -> Examination:
    """Find what can be folded in a model and what will not be quantized.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
        It is not changed.
    batch
        One batch of input, to see what feeds what.
    forward : callable (model, batch) -> output
        How to run the model on a batch.
    engine : {"tensorrt", "onnxruntime", "openvino"}, optional
        The engine that will run the model. TensorRT quantizes the shortcuts of residual sums.

    Returns
    -------
    Examination

    Raises
    ------
    InvalidInputError
        If a module is in training mode, or lazy and not initialized; if the model is TorchScript or quantized already.
    ModelError
        If the model fails on the batch, naming the layer.

    Notes
    -----
    The folded model runs on the batch as well. If it fails or its output differs, because a compiled function or the
    like used a tensor where the recording cannot see it, the folds at fault are found by halving and left alone.

    Every run starts from the same buffers. What a model appends to lists or dicts stays there from one run to the next.
    """
    check_eval(model)
    if engine is not None:
        check_engine(engine)
    return examine_copy(copy_to_fold(model), batch, forward, engine)


def copy_to_fold(model: nn.Module, layer_types: LayerTypes | None = None) -> nn.Module:
    """Return a copy of the model that can be examined and folded in place."""
    check_supported(model)
    check_float(model)
    return plain_copy(model, layer_types)


def examine_copy(model: nn.Module, batch: Any, forward: Forward, engine: Engine | None = None) -> Examination:
    """Do what :func:`examine` does with a copy that the caller owns; the copy stays as it was."""
    if forward is call_model:
        log_left_out(model, batch)
    seen, folds = _plan(model, batch, forward, all_folds)
    skipped = skipped_layers(model)
    products, floats = _split(model, seen)
    owners = {product.module for product in products}
    if engine == "tensorrt":
        layers = {name: name for name, _ in weighted_layers(model) if name not in seen.swapped}
        layers |= {fold.module: str(fold.into) for fold in folds if fold.kind == "batch_norm" and not fold.reason}
        products |= residual_sums(model, seen.additions, layers)
    calls = _repeated_calls(model, seen, products)
    skipped = {name: reason for name, reason in skipped.items() if name not in owners}
    inside = tuple(f"{name}." for name in skipped)
    computed = {
        name: f"{', '.join(dict.fromkeys(functions))} computes in floating point"
        for name, functions in floats.items()
        if name not in skipped and not name.startswith(inside)
    }
    skipped |= {**dict(other_norms(model)), **computed, **_other_weights(model, seen, products)}
    return Examination(folds, skipped, [*products], calls)


def _repeated_calls(model: nn.Module, seen: Recording, products: Counter[Product]) -> dict[str, int]:
    """Return how often one run calls each layer and operand, of those that it calls several times but not in a loop."""
    calls = {name: seen.most[name] for name, _ in weighted_layers(model) if name not in seen.swapped}
    calls |= {name: number for product, number in products.items() for name in product.names}
    return {name: number for name, number in calls.items() if 1 < number <= MOST}


def _other_weights(model: nn.Module, seen: Recording, products: Iterable[Product]) -> dict[str, str]:
    """Return why layers stay in floating point whose weights are used without them, or the other way round."""
    elsewhere = seen.read - {name for product in products for name in product.owners}
    names = [name for name, _ in weighted_layers(model)]
    return {
        **{name: SWAPPED for name in names if name in seen.swapped},
        **{name: READ_ELSEWHERE for name in names if name in elsewhere and not seen.calls[name]},
    }


def _split(model: nn.Module, seen: Recording) -> tuple[Counter[Product], dict[str, list[str]]]:
    """Return the products that can be observed, and the functions that stay in floating point, by module."""
    called = {name for name, calls in seen.calls.items() if calls}
    mixed = {p[:2] for p in seen.products if not called.isdisjoint(p.owners)}  # a layer and a function share it
    floats = {name: list(functions) for name, functions in seen.unknown.items()}
    products: dict[tuple[str, str, int], tuple[Product, int]] = {}
    for product, number in seen.products.items():
        if product[:2] in mixed or not can_own(model.get_submodule(product.module)):
            floats.setdefault(product.module, []).append(product.function)
        else:
            known, before = products.get(product[:3], (product, 0))
            products[product[:3]] = known.joined(product), max(before, number)
    return Counter(dict(products.values())), floats


def fold_batch_norm(model: nn.Module, batch: Any, *, forward: Forward = call_model) -> tuple[nn.Module, list[Fold]]:
    """Fold each BatchNorm into the convolution or linear layer that feeds it, where possible.

    With ``factor = gamma / sqrt(var + eps)`` along the output channels: ``w' = w * factor`` and
    ``b' = beta + (b - mean) * factor``. The BatchNorm becomes an identity.

    Parameters
    ----------
    model : torch.nn.Module, in eval mode
    batch
        One batch of input, to see what feeds what.
    forward : callable (model, batch) -> output
        How to run the model on a batch.

    Returns
    -------
    model : torch.nn.Module
        A folded copy.
    folds : list of Fold
        One entry for each BatchNorm.

    Raises
    ------
    InvalidInputError
        If a module is in training mode, where BatchNorm uses the statistics of the batch.
    ModelError
        If the model fails on the batch, naming the layer.

    Notes
    -----
    The arithmetic is that of ``torch.nn.utils.fusion`` in float64, rounded once to the dtype of the layer. Left alone
    are layers with hooks or with shared or parametrized weights, grouped transposed convolutions, and BatchNorms
    without running statistics or after a linear layer with inputs other than (batch, features).
    """
    return _fold(model, batch, forward, norm_folds)


def fold_relu(model: nn.Module, batch: Any, *, forward: Forward = call_model) -> tuple[nn.Module, list[Fold]]:
    """Join each ReLU or ReLU6 with the convolution or linear layer that feeds it, so that both are observed as one.

    Parameters
    ----------
    model, batch, forward
        As for :func:`fold_batch_norm`; fold BatchNorm first.

    Returns
    -------
    model : torch.nn.Module
        A copy in which such a layer is a :class:`LayerReLU` under its old name. The ReLU also stays in its place, where
        it changes nothing: other places may use the same module.
    folds : list of Fold
        One entry for each layer that was joined with its ReLU.

    Raises
    ------
    InvalidInputError
        If a module is in training mode.
    ModelError
        If the model fails on the batch, naming the layer.
    """
    return _fold(model, batch, forward, relu_folds)


_Decide: TypeAlias = Callable[[nn.Module, Recording], list[Fold]]


def _fold(model: nn.Module, batch: Any, forward: Forward, decide: _Decide) -> tuple[nn.Module, list[Fold]]:
    """Return a folded copy, and the folds."""
    check_eval(model)
    folded = copy_to_fold(model)
    _, folds = _plan(folded, batch, forward, decide)
    fold_in_place(folded, folds)
    return folded, folds


def _plan(model: nn.Module, batch: Any, forward: Forward, decide: _Decide) -> tuple[Recording, list[Fold]]:
    """Record one run, decide, and keep the folds that leave the output as it was; the model is restored."""

    def run(folds: list[Fold]) -> Recording:
        with restored(model):
            fold_in_place(model, folds)
            return record_calls(model, lambda: named(model, batch))

    def keeps_output(layers: list[Any]) -> bool:
        try:
            return outputs_agree(run([fold for fold in folds if fold.into in layers]).output, seen.output)
        except Exception:  # such as for an attribute of BatchNorm that an identity lacks
            return False

    named = naming_errors(forward)
    seen = run([])
    folds = decide(model, seen)
    layers = list(dict.fromkeys(fold.into for fold in folds if not fold.reason))
    sound = _sound(keeps_output, [], layers)
    if len(sound) == len(layers) or _agree_in_double(model, batch, forward, folds):
        return seen, folds
    reason = "folding changes the output of the model or makes it fail"
    if not outputs_agree(run([]).output, seen.output):
        reason = "the model returns a different output each time it runs"
    return seen, [fold if fold.reason or fold.into in sound else fold._replace(reason=reason) for fold in folds]


def _agree_in_double(model: nn.Module, batch: Any, forward: Forward, folds: list[Fold]) -> bool:
    """Return whether folding is right in float64: in narrower dtypes rounding may hide that, where values cancel."""
    try:
        wide = copy_model(model).double()
        given = tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, batch)
        expected = record_calls(wide, lambda: forward(wide, given)).output
        fold_in_place(wide, folds)
        return outputs_agree(record_calls(wide, lambda: forward(wide, given)).output, expected, _IN_DOUBLE)
    except Exception:  # such as for a forward that needs one dtype
        return False


def _sound(agrees: Callable[[list[Any]], bool], kept: list[Any], layers: list[Any]) -> list[Any]:
    """Return those of the layers that can be folded along with `kept`, by halving.

    Folds are nearly always right, so all of them are tried together first: one run. If the output differs, each half is
    tried in turn, and only a half that fails is divided further. With k bad layers among n this takes at most
    1 + 2 k ceil(log2 n) runs, where trying them one by one takes n.

    The result is right although the layers were not all tried alone: `kept` has always passed as a whole, and layers
    are added to it only after a run with both. So the set that is returned has been run as it is, and folds that are
    wrong only together are not both in it. It need not be the largest such set.
    """
    if not layers or agrees(kept + layers):
        return layers
    if len(layers) == 1:
        return []
    half = len(layers) // 2
    first = _sound(agrees, kept, layers[:half])
    return first + _sound(agrees, kept + first, layers[half:])
