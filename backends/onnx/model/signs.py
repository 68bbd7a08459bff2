"""Which tensors have no negative values: the integers of an unsigned grid are all of use for them."""

from collections.abc import Callable

import onnx

from .graph import FLOATS, Graph, to_array
from .operators import AVERAGING, COMBINING, MOVING, attribute, lowest

ONNX = ("", "ai.onnx")
"""Names of the domain of the standard's operators."""
ALWAYS = (
    *("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Exp", "Abs", "Sqrt"),
    *("ReduceL1", "ReduceL2", "ReduceSumSquare", "LpPool", "GlobalLpPool"),
)
"""Operators without negative results."""
KEEPING = (
    *(*MOVING, *AVERAGING, "GlobalMaxPool", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceProd", "CumSum", "TopK"),
    *("Split", "Slice", "Gather", "GatherElements", "GatherND", "Compress", "DepthToSpace", "SpaceToDepth"),
    *("Expand", "Tile", "Identity", "Dropout"),
    *("Ceil", "Floor", "Round", "Tanh", "Erf", "LeakyRelu", "Elu", "Celu", "Gelu", "HardSwish", "Mish", "Softsign"),
)
"""Operators whose results have no negative values where their first input has none."""
JOINING = (*COMBINING, "Sum", "Mean", "Min", "Div")
"""The same, for all of their inputs."""
UNSIGNED = tuple(getattr(onnx.TensorProto, name) for name in ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64"))


def non_negative(graph: Graph) -> set[str]:
    """Return the tensors that have no negative values, whatever the model is given."""
    found: set[str] = set()

    def is_non_negative(name: str) -> bool:
        constant = graph.initializers.get(name)
        return name in found or (constant is not None and bool((to_array(constant) >= 0).all()))

    for node in graph.nodes:
        if node.domain in ONNX and _gives(graph, node, is_non_negative):
            found.update(node.output[:1] if node.op_type in ("TopK", "Dropout", "MaxPool") else node.output)
    return found


def _gives(graph: Graph, node: onnx.NodeProto, holds: Callable[[str], bool]) -> bool:
    """Return whether a node gives no negative values, where `holds` says the same of a tensor."""
    kind = node.op_type
    if kind in ALWAYS:
        return True
    if kind in KEEPING:
        return holds(node.input[0])
    if kind in JOINING:
        return all(map(holds, node.input)) or (kind == "Mul" and node.input[0] == node.input[1])
    if kind == "Max":
        return any(map(holds, node.input))
    if kind == "Where":
        return all(map(holds, node.input[1:]))
    rule = {"Clip": _clip, "Resize": _resize, "Pad": _pad, "Cast": _cast}.get(kind)
    return rule is not None and rule(graph, node, holds)


def _clip(graph: Graph, node: onnx.NodeProto, holds: Callable[[str], bool]) -> bool:
    lower, upper = lowest(graph, node), node.input[2] if len(node.input) > 2 else ""
    return ((lower is not None and lower >= 0) or holds(node.input[0])) and (not upper or holds(upper))


def _resize(graph: Graph, node: onnx.NodeProto, holds: Callable[[str], bool]) -> bool:
    """Averages of neighbours keep the sign; a cubic curve swings below 0."""
    outside = attribute(node, "extrapolation_value", 0.0)
    averages = attribute(node, "mode", b"nearest") in (b"nearest", b"linear")
    return averages and isinstance(outside, float) and outside >= 0 and holds(node.input[0])


def _pad(graph: Graph, node: onnx.NodeProto, holds: Callable[[str], bool]) -> bool:
    value = node.input[2] if len(node.input) > 2 else ""
    filled = attribute(node, "mode", b"constant") == b"constant" and value
    return holds(node.input[0]) and (not filled or holds(value))


def _cast(graph: Graph, node: onnx.NodeProto, holds: Callable[[str], bool]) -> bool:
    unsigned = graph.types.get(node.input[0]) in UNSIGNED
    return attribute(node, "to", 0) in FLOATS and (unsigned or holds(node.input[0]))
