"""Choose the criterion of each tensor of an ONNX model by the error that its threshold causes behind its readers.

One graph holds the float model and, for each tensor and threshold, a copy of the tensor's readers that reads the
rounded tensor. So one session does all, and a sample costs about as much as one run of the model for each criterion.

What is best for each tensor alone may not be best for the model. So the model's own outputs have the last word: if one
criterion for all tensors does better there, it is chosen.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from klquant.errors import InvalidInputError

from ...accuracy.criterion_choice import Choice, check_candidates, choose_all, distinct_thresholds
from ...accuracy.padding import unpadded
from ...batches import numbered, tracked
from ...calibration import Calibration
from ...collection.distributed import Group, failing_together, share
from ...settings import ENGINES
from ...thresholds import LayerThreshold, candidate_thresholds
from ..correction.data import leading_samples
from ..execution import Feed, open_onnxruntime, with_outputs
from ..feeds import make_feed, read_inputs
from ..model.graph import FLOATS, MAX_CHAIN, Graph, copied
from ..model.operators import MOVING, is_rectifier, sole_consumer
from ..model.preparation import Prepared
from ..qdq.rules import make_plan
from .output_noise import OutputNoise, smooth_outputs

SAMPLES = 8  # of the data
MIXED = "mixed"
PREFIX = "klquant/error"
FLOAT = onnx.TensorProto.FLOAT


class Error(NamedTuple):
    """Where the graph computes what one threshold costs behind one reader of its tensor."""

    tensor: str
    threshold: float
    noise: str
    """The output with the sum of squared differences."""
    signal: str
    """The output with the sum of squares without rounding."""


def auto_thresholds(
    prepared: Prepared,
    calibration: Calibration,
    batches: Iterable[Any],
    *,
    progress: bool = True,
    group: Group = None,
) -> dict[str, LayerThreshold]:
    """Return the threshold of each tensor by the criterion that is best on the first samples.

    That is the choice of :func:`choose_criterion`, or one criterion for all if that is better for the model's outputs.
    Tensors whose options name a criterion keep it, and those that no engine quantizes get the least expected error. Of
    several processes the first one with data chooses.
    """
    options = calibration.settings.resolve(calibration.amax)
    amax, histograms, hidden = calibration.amax, calibration.histograms, calibration.hidden
    every = candidate_thresholds(amax, histograms, options, hidden)
    plans = (make_plan(prepared.graph, amax, engine) for engine in ENGINES)
    quantized = {name for plan in plans for name in plan.readers if name in amax}
    candidates = {key: {name: found[name] for name in quantized} for key, found in every.items()}
    inputs, chosen = read_inputs(prepared.model, prepared.graph), None
    with failing_together(group):
        feeds = leading_samples(prepared, (make_feed(batch, inputs) for _, batch in numbered(batches)), SAMPLES)
        if feeds:
            found = choose_criterion(prepared, candidates, feeds, progress=progress)
            mixed = {name: candidates[choice.criterion][name] for name, choice in found.items()}
            best = best_of(prepared, {MIXED: mixed, **candidates}, feeds)
            chosen = {name: choice.criterion if best == MIXED else best for name, choice in found.items()}
    best_criteria = share(chosen, group)
    return {name: every[best_criteria.get(name, "mse")][name] for name in amax}


def best_of(prepared: Prepared, assignments: Mapping[str, Mapping[str, LayerThreshold]], feeds: Sequence[Feed]) -> str:
    """Return which thresholds of all tensors cause the least noise in the model's outputs."""
    names, noises = smooth_outputs(prepared.graph), {key: OutputNoise() for key in assignments}
    with open_onnxruntime(with_outputs(prepared.model, names), optimized=True) as session:
        floats = [session(names, feed) for feed in feeds]
    for key, thresholds in assignments.items():
        rounding = with_outputs(rounding_model(prepared, thresholds), names)
        with open_onnxruntime(rounding, optimized=True) as session:
            for feed, outputs in zip(feeds, floats, strict=True):
                one = OutputNoise.of(unpadded(feed, outputs), unpadded(feed, session(names, feed)), names)
                noises[key] = noises[key].plus(one)
    return min(noises, key=lambda key: noises[key].share())


def choose_criterion(
    prepared: Prepared,
    candidates: Mapping[str, Mapping[str, LayerThreshold]],
    feeds: Iterable[Feed],
    *,
    progress: bool = True,
) -> dict[str, Choice]:
    """Return for each tensor the criterion whose threshold gives the least error behind the tensor's readers.

    A reader is followed through the rectifiers and the moves of values behind it. The errors of several readers count
    relative to their signals. A tensor without readers is compared itself.
    """
    check_candidates(candidates)
    model, wanted = measuring_model(prepared, candidates)
    names = list(dict.fromkeys(name for error in wanted for name in (error.noise, error.signal)))
    sums = dict.fromkeys(names, 0.0)
    seen = False
    with open_onnxruntime(model, optimized=True) as session:
        for feed in tracked(feeds, "choice of criteria" if progress else ""):
            seen = True
            for name, value in session(names, feed).items():
                sums[name] += float(value)
    if not seen:
        raise InvalidInputError("expected at least one calibration batch, got none")
    errors: dict[str, dict[float, float]] = {}
    for error in wanted:
        by_threshold = errors.setdefault(error.tensor, {})
        share = sums[error.noise] / sums[error.signal] if sums[error.signal] else 0.0
        by_threshold[error.threshold] = by_threshold.get(error.threshold, 0.0) + share
    return choose_all(candidates, errors)


def measuring_model(
    prepared: Prepared, candidates: Mapping[str, Mapping[str, LayerThreshold]]
) -> tuple[onnx.ModelProto, list[Error]]:
    """Return the model that measures, and which of its outputs belong to which threshold."""
    graph, writer, errors = prepared.graph, _Writer([], []), list[Error]()
    for name, thresholds in distinct_thresholds(candidates).items():
        chains = [chain for node in graph.consumers.get(name, []) if (chain := _chain(graph, node))]
        for threshold, layer in thresholds.items():
            rounded = writer.rounded(name, layer, graph.types[name])
            for chain in chains or [[]]:
                output, other = chain[-1].output[0] if chain else name, writer.copied(chain, name, rounded)
                noise = writer.squares(writer.node("Sub", [other, output]), graph.types.get(output, FLOAT))
                errors.append(Error(name, threshold, noise, writer.squares(output, graph.types.get(output, FLOAT))))
    model = copied(prepared.model)
    model.graph.node.extend(writer.nodes)
    model.graph.initializer.extend(writer.constants)
    names = dict.fromkeys(name for error in errors for name in (error.noise, error.signal))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return model, errors


def rounding_model(prepared: Prepared, thresholds: Mapping[str, LayerThreshold]) -> onnx.ModelProto:
    """Return the model with every tensor rounded at its threshold."""
    graph, writer, rounded = prepared.graph, _Writer([], []), dict[str, str]()

    def round_all(names: Iterable[str]) -> None:
        for name in names:
            if name in thresholds:
                rounded[name] = writer.rounded(name, thresholds[name], graph.types[name])

    round_all(graph.inputs)
    model = copied(prepared.model)
    for node in model.graph.node:
        node.input[:] = [rounded.get(name, name) for name in node.input]
        writer.nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        round_all(node.output)
    del model.graph.node[:]
    model.graph.node.extend(writer.nodes)
    model.graph.initializer.extend(writer.constants)
    return model


def _chain(graph: Graph, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return a reader, and what directly follows it if that only moves or rectifies values.

    The list is empty for a node whose output is no floating point tensor, or with graphs inside.
    """
    chain = [node]
    for _ in range(MAX_CHAIN):
        last = chain[-1]
        if any(a.type in (a.GRAPH, a.GRAPHS) for a in last.attribute) or graph.types.get(last.output[0]) not in FLOATS:
            return chain[:-1]
        following = sole_consumer(graph, last.output[0])
        moves = last.op_type in MOVING and following is not None
        if following is None or not (moves or is_rectifier(graph, following)):
            break
        chain.append(following)
    return chain


class _Writer(NamedTuple):
    """Nodes and constants to add to a graph."""

    nodes: list[onnx.NodeProto]
    constants: list[onnx.TensorProto]

    def node(self, kind: str, inputs: list[str], **attributes: Any) -> str:
        """Add a node with one output, and return the output."""
        output = f"{PREFIX}/{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def constant(self, value: float, dtype: int) -> str:
        """Add a constant, and return its name."""
        name = f"{PREFIX}/constant{len(self.constants)}"
        array = np.asarray(value, helper.tensor_dtype_to_np_dtype(dtype))
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def rounded(self, name: str, layer: LayerThreshold, dtype: int) -> str:
        """Return a tensor rounded to the levels of its threshold."""
        levels, scale = 2 ** (layer.num_bits - 1) - 1, self.constant(layer.scale, dtype)
        if layer.num_bits == 8 and dtype == FLOAT:
            zero = self.constant(0, onnx.TensorProto.INT8)
            return self.node("DequantizeLinear", [self.node("QuantizeLinear", [name, scale, zero]), scale, zero])
        codes = self.node("Round", [self.node("Div", [name, scale])])
        bounds = [self.constant(bound, dtype) for bound in (-levels, levels)]
        return self.node("Mul", [self.node("Clip", [codes, *bounds]), scale])

    def copied(self, chain: list[onnx.NodeProto], name: str, other: str) -> str:
        """Return the output of a copy of some nodes in a row, of which the first reads another tensor."""
        for node in chain:
            copy = onnx.NodeProto.FromString(node.SerializeToString())
            prefix = f"{PREFIX}/{len(self.nodes)}"
            copy.name, copy.input[:] = prefix, [other if one == name else one for one in node.input]
            copy.output[:] = [one and f"{prefix}/{k}" for k, one in enumerate(node.output)]
            self.nodes.append(copy)
            name, other = node.output[0], copy.output[0]
        return other

    def squares(self, name: str, dtype: int) -> str:
        """Return the sum of squares of a tensor, in float32."""
        wide = name if dtype == FLOAT else self.node("Cast", [name], to=FLOAT)
        return self.node("ReduceSumSquare", [wide], keepdims=0)
