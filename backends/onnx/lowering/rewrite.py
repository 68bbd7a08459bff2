"""Rewrite operators without INT8 kernels into some with, and move the factors that this leaves into weights.

HardSigmoid(x) = alpha * clip(x + beta / alpha, 0, 1 / alpha). Sum and clip are one INT8 kernel of onnxruntime, because
a quantizer that saturates clips. The factor alpha commutes with products, pooling and the like, until a layer's weight
takes it up. The same holds for every product with a scalar.
PRelu(x) = x + relu((slope - 1) x) if no slope is above 1.
"""

from typing import NamedTuple

import numpy as np
import onnx

from ..correction.parameters import with_parameters
from ..feeds import Array
from ..model.operators import attribute, has_constant_weight
from ..model.preparation import Prepared
from .draft import Draft
from .scalars import affine

COMMUTING = (
    *("Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"),
    *("ReduceMax", "ReduceMin", "ReduceSum", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"),
    *("Slice", "Split", "Gather", "DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Resize"),
)
"""Operators f with f(s x) = s f(x) for s > 0, where x is the first input."""
SUMS = ("Add", "Sub", "Concat")
PRODUCTS = ("Mul", "MatMul")
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Rewritten(NamedTuple):
    """A float model that computes the same with other operators."""

    prepared: Prepared
    origins: dict[str, list[tuple[str, float]]]
    """Tensors of the old model, and the factor by which each is multiplied, by the name of the tensor that holds it."""
    fixed: dict[str, float]
    """Largest value of tensors that no calibration has seen, or that are clipped there."""
    slopes: dict[str, tuple[str, float]]
    """Of what is added for the negative part of a tensor: the tensor, and the largest factor."""
    nodes: dict[str, tuple[str, ...]]
    """Tensors that must be quantized for a node to be worth rewriting, by its name."""
    products: set[str]
    """Names of new products with constants."""
    returned: set[str]
    """Names of products with scalars that could not be moved into a weight."""


def rewrite(prepared: Prepared, spared: set[str]) -> Rewritten:
    """Rewrite HardSigmoid, PRelu and products with scalars, except for the nodes that are spared."""
    return _Rewriting(prepared, spared).result()


class _Rewriting:
    def __init__(self, prepared: Prepared, spared: set[str]) -> None:
        self._prepared, self._draft, self._spared = prepared, Draft(prepared), spared
        self._graph = self._draft.graph
        self._factors: dict[str, float] = {}
        self._held: dict[str, str] = {}
        self._restored: dict[str, str] = {}
        self._weights: dict[tuple[str, int], Array] = {}
        self._fixed: dict[str, float] = {}
        self._slopes: dict[str, tuple[str, float]] = {}
        self._nodes: dict[str, tuple[str, ...]] = {}
        self._origins: dict[str, list[tuple[str, float]]] = {}
        self._products: set[str] = set()
        self._returned: set[str] = set()
        self._scalars: dict[str, frozenset[str]] = {}

    def result(self) -> Rewritten:
        for node in self._graph.nodes:
            self._draft.replace(node, self._new(node))
        for name in self._graph.tensors():
            self._origins.setdefault(self._holder(name), []).append((name, self._factor(name)))
        prepared = self._draft.finished()
        if self._weights:
            prepared = with_parameters(prepared, self._weights)
        return Rewritten(
            prepared, self._origins, self._fixed, self._slopes, self._nodes, self._products, self._returned
        )

    def _factor(self, name: str) -> float:
        return self._factors.get(name, 1.0)

    def _holder(self, name: str) -> str:
        return self._held.get(name, name)

    def _new(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return what takes the place of a node."""
        inner = self._graph.outputs and not set(node.output).isdisjoint(self._graph.outputs)
        rewritten = None
        if not inner and node.domain in ("", "ai.onnx"):
            rewritten = self._rewritten(node)
        if rewritten is not None:
            return rewritten
        if self._factor(node.input[0] if node.input else "") != 1 and self._absorbed(node):
            return [self._renamed(node)]
        before = [new for name in dict.fromkeys(node.input) for new in self._restore(name)]
        return [*before, self._renamed(node, restored=True)]

    def _rewritten(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        kind = node.op_type
        is_float = node.input and self._graph.types.get(node.input[0]) == onnx.TensorProto.FLOAT
        if node.name not in self._spared and is_float:
            if kind == "HardSigmoid":
                return self._hard_sigmoid(node)
            if kind == "PRelu" and (new := self._prelu(node)):
                return new
            if kind in ("Mul", "Div") and self._scaled(node):
                return []
        return self._passed(node)

    def _hard_sigmoid(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        alpha, beta = float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))  # type: ignore[arg-type]
        if alpha <= 0:
            return None
        (name,), (output,) = node.input, node.output
        factor = self._factor(name)
        scale = factor / alpha
        offset, total = self._draft.constant(f"{output}_offset", beta * scale), self._draft.unused(f"{output}_sum")
        bounds = [self._draft.constant(f"{output}_{end}", value) for end, value in (("low", 0.0), ("high", scale))]
        self._factors[output], self._fixed[output] = scale, scale
        self._nodes[node.name] = (self._holder(name), output)
        return [
            self._draft.node("Add", [self._holder(name), offset], total),
            self._draft.node("Clip", [total, *bounds], output, node.name),
        ]

    def _prelu(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        name, slopes, output = node.input[0], self._draft.vector(node.input[1]), node.output[0]
        if slopes is None or not np.isfinite(slopes).all() or (slopes == 1).all():
            return None
        held, self._factors[output] = self._holder(name), self._factor(name)
        if (slopes == slopes.flat[0]).all():
            return [self._draft.node("LeakyRelu", [held], output, node.name, alpha=float(slopes.flat[0]))]
        new, negative, added = self._negative_part(held, slopes - 1, output)
        self._nodes[node.name] = (held, negative, added, output)
        return [*new, self._draft.node("Add", [held, added], output, node.name)]

    def _negative_part(self, name: str, factors: Array, output: str) -> tuple[list[onnx.NodeProto], str, str]:
        """Return nodes that compute min(x, 0) times the factors, the negative part of x, and the result."""
        product, negative = self._draft.unused(f"{output}_product"), self._draft.unused(f"{output}_negative")
        one_sign = factors.max() <= 0
        first = self._draft.constant(f"{output}_slopes", factors if one_sign else -1.0)
        new = [self._product(name, first, product), self._draft.node("Relu", [product], negative)]
        self._slopes[negative] = name, float(-factors.min()) if one_sign else 1.0
        if one_sign:
            return new, negative, negative
        second, added = self._draft.constant(f"{output}_slopes", -factors), self._draft.unused(f"{output}_added")
        self._slopes[added] = name, float(np.abs(factors).max())
        return [*new, self._product(negative, second, added)], negative, added

    def _scaled(self, node: onnx.NodeProto) -> bool:
        """Remove a product with a positive scalar, and count it among the factors."""
        for name in node.input:
            found = affine(self._draft, node, name) if self._graph.is_activation(name) else None
            if found is not None and found[0] > 0:
                self._factors[node.output[0]] = self._factor(name) / found[0]
                self._held[node.output[0]] = self._holder(name)
                own = set() if self._ends_hard_swish(name) else {node.name}
                self._scalars[node.output[0]] = self._scalars.get(name, frozenset()) | own
                return True
        return False

    def _ends_hard_swish(self, name: str) -> bool:
        """Return whether a tensor is a product with what a Clip gives."""
        product = self._graph.producers.get(name)
        factors = [self._graph.producers.get(one) for one in product.input] if product is not None else []
        clips = [one for one in factors if one is not None and one.op_type == "Clip"]
        return product is not None and product.op_type == "Mul" and bool(clips)

    def _passed(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """Pass factors on to the result of a node, if it commutes with them."""
        kind, factors = node.op_type, [self._factor(name) for name in node.input]
        if set(factors) <= {1.0}:
            return [self._renamed(node)]
        floats = [self._factor(name) for name in node.input if self._graph.is_activation(name)]
        if kind in COMMUTING and factors[1:] == [1.0] * len(factors[1:]):
            found = factors[0]
        elif kind in PRODUCTS and not (kind == "MatMul" and has_constant_weight(self._graph, node)):
            found = float(np.prod(factors))
        elif (
            kind in SUMS and len(set(floats)) == 1 and (kind != "Concat" or len(floats) == len(factors))
        ) or kind == "Clip":
            return self._shifted(node, floats[0])
        else:
            return None
        self._pass(node, found)
        return [self._renamed(node)]

    def _shifted(self, node: onnx.NodeProto, factor: float) -> list[onnx.NodeProto] | None:
        """Multiply the constants of a sum or a clip."""
        new = self._renamed(node)
        for k, name in enumerate(node.input):
            if name and not self._graph.is_activation(name):
                values = self._draft.vector(name)
                if values is None:
                    return None
                new.input[k] = self._draft.constant(f"{name}_scaled", values * factor)
        self._pass(node, factor)
        return [new]

    def _pass(self, node: onnx.NodeProto, factor: float) -> None:
        scalars = frozenset[str]().union(*(self._scalars.get(name, ()) for name in node.input))
        for name in node.output:
            self._factors[name], self._scalars[name] = factor, scalars

    def _absorbed(self, node: onnx.NodeProto) -> bool:
        """Divide the weight of a layer by the factor of its input."""
        if node.op_type not in LAYERS or node.domain not in ("", "ai.onnx"):
            return False
        if not has_constant_weight(self._graph, node) or (vector := self._draft.vector(node.input[1])) is None:
            return False
        if len(node.input) > 2 and self._factor(node.input[2]) != 1:
            return False
        self._weights[node.name, 1] = (vector / self._factor(node.input[0])).astype(np.float32)
        return True

    def _restore(self, name: str) -> list[onnx.NodeProto]:
        """Return the node that takes the factor out of a tensor, if there is none yet."""
        factor = self._factor(name)
        if factor == 1 or name in self._restored:
            return []
        restored = name if name in self._held else self._draft.unused(f"{name}_restored")
        self._restored[name] = restored
        self._origins.setdefault(restored, []).append((name, 1.0))
        self._returned |= self._scalars.get(name, frozenset())
        return [self._product(self._holder(name), self._draft.constant(f"{name}_inverse", 1 / factor), restored)]

    def _product(self, name: str, constant: str, output: str) -> onnx.NodeProto:
        node = self._draft.node("Mul", [name, constant], output)
        self._products.add(node.name)
        return node

    def _renamed(self, node: onnx.NodeProto, *, restored: bool = False) -> onnx.NodeProto:
        new: onnx.NodeProto = onnx.NodeProto.FromString(node.SerializeToString())
        new.input[:] = [(restored and self._restored.get(name)) or self._holder(name) for name in node.input]
        return new
