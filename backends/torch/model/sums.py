"""Residual sums: which sums an engine fuses into the layer that computes one operand, if the other one is quantized.

TensorRT does so for the output of a layer that nothing else reads. The other operand is the shortcut. Where both come
from such layers, the one behind fewer layers is the shortcut. Other sums stay in floating point.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

from .calls import layer_of
from .dataflow import Addition, Call
from .functions import ADD
from .products import Product, can_own

Found = TypeVar("Found")


def residual_sums(model: nn.Module, additions: Iterable[Addition], layers: Mapping[str, str]) -> Counter[Product]:
    """Return the residual sums among these, and how often each is computed in one run; its operand is the shortcut.

    `layers` has the layer of each module whose output is that of a layer: of itself, or of a folded BatchNorm.
    """
    found: dict[tuple[str, int], set[Product | None]] = {}
    times: Counter[tuple[str, int]] = Counter()
    for one in additions:
        if can_own(model.get_submodule(one.module)):
            found.setdefault(one[:2], set()).add(_residual(model, one, layers))
            times[one[:2]] = max(times[one[:2]], one.times)
    same = ((key, calls.pop()) for key, calls in found.items() if len(calls) == 1)
    return Counter({product: times[key] for key, product in same if product is not None})


def _residual(model: nn.Module, sum_: Addition, layers: Mapping[str, str]) -> Product | None:
    branches = {name: layer for name, one in sum_.operands.items() for layer in _branch(model, one.call, layers)}
    if not branches:
        return None
    shortcuts = [name for name in sum_.operands if name not in branches] or list(branches)
    shortcut = min(shortcuts, key=lambda name: sum_.operands[name].level)
    layer = next(layer for name, layer in branches.items() if name != shortcut)
    return Product(sum_.module, ADD, sum_.number, shortcut, f"{layer}.weight")


def _branch(model: nn.Module, call: Call | None, layers: Mapping[str, str]) -> Iterator[str]:
    """Yield the layer whose operator computes the output of this call, if only the sum reads it."""
    if call is None or call.module not in layers:
        return
    consumers = [one for one in call.consumers if "dropout" not in getattr(one.function, "__name__", "")]
    layer: Any = model.get_submodule(layers[call.module])
    # a bias is another node in ONNX where Linear has inputs of more dimensions, and so is a missing batch dimension
    is_last = call.output_ndim == layer.weight.ndim or (isinstance(layer, nn.Linear) and layer.bias is None)
    if len(consumers) == 1 and is_last:
        yield layers[call.module]


def without_orphans(found: Mapping[str, Found], products: Iterable[Product]) -> dict[str, Found]:
    """Return what was found by name, without the operands of sums whose layer is not among the names."""
    layers = {layer_of(name) for name in found}
    sums = (one for one in products if one.function == ADD and layers.isdisjoint(one.owners))
    orphans = {name for one in sums for name in one.names}
    return {name: value for name, value in found.items() if layer_of(name) not in orphans}
