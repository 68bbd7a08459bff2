"""Bring equal models to equal bytes: fix the order and the names that onnxruntime leaves open."""

from collections.abc import Iterator
from graphlib import TopologicalSorter
from heapq import heappop, heappush
from math import inf

import onnx

from .graph import Graph, node_key


def model_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a model, including those of functions, branches and loops."""
    for part in (model.graph, *model.functions):
        yield from all_nodes(part)


def all_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph, including those of branches and loops."""
    for node in graph.node:
        yield from with_inner(node)


def with_inner(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Yield a node and those of its subgraphs."""
    yield node
    for attribute in node.attribute:
        for body in (attribute.g, *attribute.graphs):
            yield from all_nodes(body)


def keep_body_inputs(graph: Graph) -> Graph:
    """Return the graph with all that bodies of branches and loops read among its outputs: it must not be scaled."""
    bodies = (inner for node in graph.nodes for inner in with_inner(node) if inner is not node)
    return graph._replace(outputs=[*graph.outputs, *(name for inner in bodies for name in inner.input)])


def tidy(model: onnx.ModelProto, like: onnx.ModelProto) -> onnx.ModelProto:
    """Order the nodes as in another model, name each of them, and sort all else by name."""
    for node in all_nodes(model.graph):
        node.attribute.sort(key=lambda attribute: attribute.name)
    model.graph.initializer.sort(key=lambda tensor: tensor.name)
    _order_nodes(model.graph, like.graph)
    _name_nodes(model.graph)
    used = {"", *(node.domain for node in all_nodes(model.graph))}
    for opset in [entry for entry in model.opset_import if entry.domain not in used]:
        model.opset_import.remove(opset)
    return model


def sort_values(graph: onnx.GraphProto) -> None:
    """Sort the types of node outputs in the order of the nodes, and drop all other types."""
    order = _positions(graph)
    for value in [value for value in graph.value_info if value.name not in order]:
        graph.value_info.remove(value)
    graph.value_info.sort(key=lambda value: order[value.name])


def _positions(graph: onnx.GraphProto) -> dict[str, int]:
    return {name: k for k, name in enumerate(name for node in graph.node for name in node.output if name)}


def _order_nodes(graph: onnx.GraphProto, like: onnx.GraphProto) -> None:
    """Sort by the positions of the outputs in the other graph, but keep the order topological."""
    wanted = _positions(like)
    producers = {name: node_key(node) for node in graph.node for name in node.output if name}
    reads = {node_key(node): {name for inner in with_inner(node) for name in inner.input} for node in graph.node}
    before = {key: {producers[name] for name in names & producers.keys()} for key, names in reads.items()}
    sorter = TopologicalSorter(before)
    sorter.prepare()
    ready: list[tuple[float, str]] = []
    order: dict[str, int] = {}
    while sorter.is_active():
        for key in sorter.get_ready():
            heappush(ready, (wanted.get(key, inf), key))
        first = heappop(ready)[1]
        order[first] = len(order)
        sorter.done(first)
    graph.node.sort(key=lambda node: order[node_key(node)])


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Name each node without a unique name after its operator and its first output."""
    taken, seen = {node.name for node in graph.node}, {""}
    for node in graph.node:
        if node.name in seen:
            node.name = f"{node.op_type}_{node_key(node)}"
            while node.name in taken:
                node.name += "_"
        seen.add(node.name)
        taken.add(node.name)
