"""The shortcuts of residual sums in an exported model are those that the simulation for TensorRT rounds."""

import functools
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from klquant.backends.onnx.model.observed import observed_tensors
from klquant.backends.onnx.model.preparation import prepare
from klquant.backends.onnx.qdq.rules import make_plan
from klquant.backends.torch import export_onnx, quantize, requantize, saturate_like_engines
from klquant.backends.torch.export import qdq
from klquant.backends.torch.export.markers import remove_marks
from klquant.backends.torch.export.trace import trace
from klquant.backends.torch.model.arguments import arguments_of
from klquant.backends.torch.model.dataflow import tensors_in
from klquant.backends.torch.model.forward import call_model
from klquant.backends.torch.simulation import quantized_layers
from klquant.demo.digits import load_images
from klquant.errors import CalibrationWarning
from support import digits_networks, zoo
from support.networks import Net, batch, outputs, ready
from support.onnx_models import array, run, run_all


def result_of(model, batches, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # of random networks
        return quantize(model, batches, **{"num_bins": 255, "criterion": "mse", "engine": "tensorrt", **options})


def shortcuts(exported):
    """Return the tensors whose quantized values are added, by the name of the sum."""
    nodes = {output: node for node in exported.model.graph.node for output in node.output}
    found = {}
    for node in exported.model.graph.node:
        for name in node.input if node.op_type == "Add" else ():
            if name in nodes and nodes[name].op_type == "DequantizeLinear":
                found[node.name] = nodes[nodes[name].input[0]].input[0]
    return found


def assert_equals_simulation(result, exported, given):
    """Check the outputs to the tolerance of `test_export.py`."""
    expected = tensors_in(outputs(lambda: call_model(saturate_like_engines(result.model), given)))
    feeds = {value.name: x.numpy() for value, x in zip(exported.model.graph.input, tensors_in(given), strict=True)}
    for got, wanted in zip(run(exported.model, **feeds).values(), expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


# --- equal to the simulation ---


@functools.cache
def digits():
    """Return a trained residual network, quantized and exported for TensorRT, and test images."""
    data = load_images()
    result = result_of(digits_networks.load("residual net"), list(data.train_images[:64].split(32)), num_bins=1001)
    return result, export_onnx(result, data.train_images[:1]), data.test_images[:64]


def test_a_trained_network_has_the_scales_of_the_simulation():
    result, exported, _ = digits()
    simulated = [layer.scale for name, layer in result.thresholds.items() if ":add" in name]
    written = [array(exported.model, f"{tensor}_scale") for tensor in shortcuts(exported).values()]
    assert len(written) == 3
    assert [scale.tobytes() for scale in written] == [np.float32(scale).tobytes() for scale in simulated]


def test_a_trained_network_computes_the_codes_of_the_simulation():
    """At most one in a thousand differs, and by 1, as for the layers in `test_export.py`."""
    result, exported, images = digits()
    got, found = run_all(exported.model, input=images.numpy()), {}
    model = saturate_like_engines(result.model)

    def look(tap, args, name):
        found[name] = (args[0] / tap.scale).round().clamp(-128, 127)

    for name, tap in quantized_layers(model).items():
        if ":add" in name:
            tap.register_forward_pre_hook(functools.partial(look, name=name))
    wanted = outputs(model, images)
    for codes, tensor in zip(found.values(), shortcuts(exported).values(), strict=True):
        distance = np.abs(got[f"{tensor}_quantized"].astype(int) - codes.numpy())
        assert distance.max() <= 1
        assert (distance == 0).mean() > 0.999
    logits = torch.from_numpy(got[exported.model.graph.output[0].name])
    assert (logits.argmax(1) == wanted.argmax(1)).double().mean() > 0.98


def test_a_random_network_computes_what_is_simulated_and_another_simulation_does_not():
    model, batches = zoo.load("resnet", torch.float32)
    result = result_of(model, batches)
    exported = export_onnx(result, batches[0])
    assert len(shortcuts(exported)) == 2
    for given in batches:
        assert_equals_simulation(result, exported, given)
    with pytest.raises(AssertionError, match="not close"):
        assert_equals_simulation(result_of(model, batches, engine=None), exported, batches[0])


@pytest.mark.filterwarnings("ignore:node .* stays in floating point. Gather:klquant.errors.CalibrationWarning")
def test_a_transformer_without_biases_computes_what_is_simulated():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    model = transformers.T5EncoderModel(config).eval()
    data = [torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(k)) for k in range(2)]
    result = result_of(model, data)
    exported = export_onnx(result, data[0], dynamic_batch=False)
    sums = [name for name in result.thresholds if ":add" in name]
    assert sums == [f"encoder.block.0.layer.{part}:add.0.input" for part in range(2)]
    assert len(shortcuts(exported)) == 2
    assert_equals_simulation(result, exported, data[1])


# --- the rule is that of ONNX models ---


def block(pick):
    """Return a random residual block: its modules, and a function of them and its input."""
    kind, relu, swap, write, norm = (
        pick.choice(["plain", "down", "functional", "bare"]),
        *(pick.random() < 0.5 for _ in range(4)),
    )
    parts = {"one": nn.Conv2d(4, 4, 3, padding=1), "two": nn.Conv2d(4, 4, 1, groups=2), "down": nn.Conv2d(4, 4, 1)}
    parts["norm"] = nn.BatchNorm2d(4) if norm else nn.Identity()
    gate = pick.choice([F.relu, torch.sigmoid, nn.Identity().eval()])

    def run(net, x):
        y = net.norm(net.two(F.relu(net.one(x)) if kind != "bare" else x))
        shortcut = net.down(x) if kind == "down" else x
        if kind == "functional":
            y = gate(y)
        if write:
            shortcut += y if swap else 0 * y
        first, second = (shortcut, y) if swap else (y, shortcut)
        result = shortcut if write and swap else torch.add(first, second)
        return F.relu(result) if relu else result

    return Net(run, **parts)


@pytest.mark.parametrize("seed", range(3))
def test_random_residual_networks_round_the_shortcuts_of_the_rule_for_onnx_models(seed):
    pick = random.Random(seed)  # noqa: S311
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *(block(pick) for _ in range(5)), nn.Conv2d(4, 2, 1))
    given = batch(2, 3, 6, 6, dtype=torch.float32)
    result = result_of(ready(model, dtype=torch.float32), [given])
    arguments = arguments_of(result.model, given)
    options = {"dynamic_batch": True, "dynamic_shapes": {}, "input_names": None, "output_names": None}
    floats, found = remove_marks(trace(result.model, arguments, **options))
    graph = prepare(floats).graph
    sums = {node.name for node in graph.nodes if node.op_type == "Add"}
    rule = make_plan(graph, observed_tensors(graph), "tensorrt").readers
    wanted = {(tensor, name) for tensor, readers in rule.items() for name in readers & sums}
    assert wanted == {(tensor, name) for tensor, readers in found.readers.items() for name in readers & sums}
    assert sum(":add" in name for name in result.thresholds) == len(wanted)


# --- data, and exclusion ---


def residual(**modules):
    return ready(
        Net(
            lambda net, x: net.last(F.relu(net.a(x) + net.b(F.relu(net.c(x))))),
            **{name: nn.Conv2d(3, 3, 1) for name in ("a", "b", "c", "last")},
            **modules,
        ),
        dtype=torch.float32,
    )


IMAGES = [batch(4, 3, 6, 6, seed=k, dtype=torch.float32) for k in range(2)]


@pytest.mark.parametrize("options", [{}, {"batches": IMAGES}])
def test_nothing_is_calibrated_again(options, monkeypatch):
    result = result_of(residual(), IMAGES)
    monkeypatch.setattr(qdq, "calibrate", None)
    exported = export_onnx(result, IMAGES[0], **options)
    assert [exported.thresholds[tensor] for tensor in shortcuts(exported).values()] == pytest.approx(
        [result.thresholds[":add.0.input"].threshold]
    )


@pytest.mark.parametrize(("exclude", "whole"), [(":add.0", True), (":add*", False), (".b", False)])
def test_an_excluded_sum_stays_in_floating_point(exclude, whole):
    """Also in the model alone, if another sum is rounded."""
    model = Net(lambda net, x: net.second(net.first(x)), first=residual(), second=residual())
    result = result_of(model.eval(), IMAGES, exclude=f"first{exclude}")
    exported = export_onnx(result if whole else result.model, IMAGES[0], batches=IMAGES)
    assert [name for name in result.thresholds if ":add" in name] == ["second:add.0.input"]
    assert len(shortcuts(exported)) == 1
    assert_equals_simulation(result, exported, IMAGES[0])


@pytest.mark.parametrize("export", [lambda r: r.model, lambda r: requantize(residual(), r.calibration)])
def test_shortcuts_that_are_not_rounded_are_named_with_what_to_do(export):
    simulation = export(result_of(residual(), IMAGES, engine=None))
    with pytest.warns(CalibrationWarning, match='does not round its shortcut.*engine="tensorrt" or pass `batches`'):
        exported = export_onnx(simulation, IMAGES[0])
    (add,) = (node.name for node in exported.model.graph.node if node.op_type == "Add")
    assert exported.skipped == {add: qdq.SHORTCUT}
    for options in ({"batches": IMAGES}, {"engine": "openvino"}):
        assert export_onnx(simulation, IMAGES[0], **options).skipped == {}


def test_without_the_engine_the_rules_quantize_sums_as_before():
    result = result_of(residual(), IMAGES, engine=None)
    assert not [name for name in result.thresholds if ":add" in name]
    assert len(shortcuts(export_onnx(result, IMAGES[0]))) == 1
