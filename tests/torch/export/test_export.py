import functools
import logging
import sys
import warnings

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from klquant.backends.torch import export_onnx, quantize, saturate_like_engines
from klquant.backends.torch.export.api import _Arrays
from klquant.backends.torch.model.dataflow import tensors_in
from klquant.backends.torch.model.forward import call_model
from klquant.backends.torch.simulation import QuantizedLayer
from klquant.demo.digits import load_images
from klquant.errors import CalibrationWarning, InvalidInputError, MissingDependencyError, ModelError
from support import digits_networks, zoo
from support.networks import Net, batch, fingerprint, mlp, outputs, ready
from support.onnx_models import array, run, run_all

NETWORKS = ("VGG", "residual net", "MobileNetV2")
SHORTCUTS = "the simulation does not round its shortcut"  # test_residual_sums.py is about them
pytestmark = pytest.mark.filterwarnings(f"ignore:.*{SHORTCUTS}:klquant.errors.CalibrationWarning")


def simulated(model, batches, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # of random networks; other tests are about that
        return quantize(model, batches, **{"num_bins": 255, **options}).model


def images(channels=3, size=6, count=2, scale=1.0):
    return [scale * batch(4, channels, size, size, seed=k, dtype=torch.float32) for k in range(count)]


def compute(exported, given, **options):
    """Return the outputs of an exported model for a batch of any form, in the order of the graph."""
    tensors = tensors_in(given)
    feeds = {value.name: x.numpy() for value, x in zip(exported.model.graph.input, tensors, strict=True)}
    return [torch.from_numpy(x) for x in run(exported.model, **options, **feeds).values()]


def assert_equals_simulation(model, exported, given):
    expected = outputs(lambda: call_model(saturate_like_engines(model), given))
    for got, wanted in zip(compute(exported, given), tensors_in(expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))  # sums in another order


def nodes(exported, kind):
    return [node for node in exported.model.graph.node if node.op_type == kind]


def producer(exported, tensor):
    return next((node for node in exported.model.graph.node if tensor in node.output), None)


def reader(exported, weight):
    """Return the node that reads a weight, in floating point or dequantized."""
    return next(node for node in exported.model.graph.node if {weight, f"{weight}_dequantized"} & set(node.input[1:]))


def quantizer(exported, weight):
    """Return the QuantizeLinear whose result the layer with this weight reads, or None."""
    dequantize = producer(exported, reader(exported, weight).input[0])
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    return producer(exported, dequantize.input[0])


def skipped_layers(exported):
    return {name: reason for name, reason in exported.skipped.items() if SHORTCUTS not in reason}


def sizes(exported):
    return [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in exported.model.graph.input]


# --- equal to the simulation ---


@functools.cache
def digits(name):
    """Return the simulation of a digits network, its export, and test images."""
    data = load_images()
    model = simulated(digits_networks.load(name), list(data.train_images[:64].split(32)), num_bins=1001)
    return model, export_onnx(model, data.train_images[:1]), data.test_images[:64]


def simulated_codes(model, given):
    """Return the input of each layer, quantized by the formula."""
    found = {}

    def look(module, args, name):
        found[name] = np.clip(np.rint(args[0].numpy() / module.scale.numpy()), -128, 127).astype(np.int8)

    model = saturate_like_engines(model)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            layer.register_forward_pre_hook(functools.partial(look, name=name))
    outputs(model, given)
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_the_codes_are_those_of_the_simulation(name):
    model, exported, given = digits(name)
    expected = simulated_codes(model, given)
    got = run_all(exported.model, input=given.numpy())
    same = np.ones(len(given), bool)  # images on which all codes so far are the same
    equal = total = 0
    for layer, codes in expected.items():
        distance = np.abs(got[quantizer(exported, f"{layer}.weight").output[0]].astype(int) - codes)
        assert distance[same].max() <= 1
        same &= distance.reshape(len(distance), -1).max(1) == 0
        equal, total = equal + (distance == 0).sum(), total + distance.size
    assert len(expected) == len(nodes(exported, "Conv")) + len(nodes(exported, "Gemm"))
    assert not skipped_layers(exported)
    assert equal / total >= 0.999
    logits, wanted = torch.from_numpy(got["linear_1" if name == "VGG" else "linear"]), outputs(model, given)
    assert (logits.argmax(1) == wanted.argmax(1)).double().mean() > 0.98


@pytest.mark.parametrize("name", NETWORKS)
def test_scales_and_weights_are_those_of_the_simulation_bit_for_bit(name):
    model, exported, _ = digits(name)
    for layer, module in model.named_modules():
        if isinstance(module, QuantizedLayer):
            scale = array(exported.model, quantizer(exported, f"{layer}.weight").input[1])
            assert scale.dtype == np.float32
            assert scale.tobytes() == module.scale.numpy().tobytes()
            steps = array(exported.model, f"{layer}.weight_scale").reshape(-1, *[1] * (module.weight.ndim - 1))
            codes = array(exported.model, f"{layer}.weight_quantized")
            assert codes.min() >= -127
            np.testing.assert_allclose(codes * steps, module.weight.numpy(), rtol=3e-7, atol=0)


def test_dead_channels_and_a_silent_tensor_give_zeros():
    model = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), dtype=torch.float32)
    with torch.no_grad():
        model[0].weight[1] = 0.9e-4
        model[0].bias.fill_(-1e6)  # so the second layer sees zeros only
    model, given = simulated(model, images()), images()[0]
    with pytest.warns(CalibrationWarning, match="make weights coarser"):
        exported = export_onnx(model, given)
    assert not array(exported.model, "0.weight_quantized")[1].any()
    assert np.isfinite(array(exported.model, "0.weight_scale")).all()
    assert array(exported.model, quantizer(exported, "2.weight").input[1]) == 1
    assert_equals_simulation(model, exported, given)


@functools.cache
def small(name):
    """Return the simulation of a model of the zoo, its export, and batches of two sizes."""
    model, batches = zoo.load(name, torch.float32)
    model = simulated(model, batches)
    return model, export_onnx(model, batches[0]), (batches[0], batches[-1])


@pytest.mark.parametrize("name", ["called_twice", "transposed", "padding_modes", "inputs_by_name"])
def test_small_models_compute_what_is_simulated(name):
    model, exported, batches = small(name)
    for given in batches:
        assert_equals_simulation(model, exported, given)


def test_values_below_the_range_get_the_code_of_the_saturating_simulation():
    model = simulated(nn.Sequential(nn.Linear(3, 2)).eval(), [torch.ones(2, 3)], overrides={"0": {"threshold": 1.0}})
    given = torch.tensor([[-9.0, 9.0, -1.0]])
    exported = export_onnx(model, given)
    codes = run_all(exported.model, input=given.numpy())[quantizer(exported, "0.weight").output[0]]
    assert codes.tolist() == [[-128, 127, -127]]
    assert_equals_simulation(model, exported, given)
    assert not torch.equal(compute(exported, given)[0], outputs(model, given))


# --- places of quantizers ---


def branches(**options):
    """Return a simulated stem that feeds two layers, `a` and `b`, a functional one and the output, and a batch."""

    def run(net, x):
        y = F.relu(net.stem(x))
        return net.a(y) + net.b(y) + F.conv2d(y, net.a.weight) + y

    parts = {"stem": nn.Conv2d(3, 4, 3, padding=1), "a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1)}
    return simulated(ready(Net(run, **parts), dtype=torch.float32), images(), **options), images()[0]


def test_layers_that_share_an_input_share_a_quantizer_and_nothing_else_reads_it():
    model, given = branches()
    exported = export_onnx(model, given)
    assert quantizer(exported, "a.weight") is not None
    assert quantizer(exported, "a.weight").name == quantizer(exported, "b.weight").name
    assert len(nodes(exported, "QuantizeLinear")) == 2
    assert sorted(node.op_type for node in exported.model.graph.node if "relu_1" in node.input) == [
        "Add",
        "Conv",
        "QuantizeLinear",
    ]
    assert list(skipped_layers(exported).values()) == ["the simulation computes it in floating point"]
    assert_equals_simulation(model, exported, given)


def test_layers_that_round_their_common_input_differently_have_separate_quantizers():
    model, given = branches(overrides={"a": {"threshold": 0.5}, "b": {"threshold": 1.5}})
    exported = export_onnx(model, given)
    scales = [array(exported.model, quantizer(exported, f"{name}.weight").input[1]) for name in "ab"]
    assert scales == [np.float32(0.5 / 127), np.float32(1.5 / 127)]
    assert_equals_simulation(model, exported, given)
    with pytest.raises(InvalidInputError, match=r"layers `a` and `b` must round their common input \(`relu_1`\)"):
        export_onnx(model, given, engine="onnxruntime")


def test_an_excluded_layer_stays_in_floating_point_beside_a_quantized_one():
    model, given = branches(exclude="b")
    with pytest.warns(CalibrationWarning, match="stays in floating point: no threshold"):
        exported = export_onnx(model, given, engine="onnxruntime")
    assert quantizer(exported, "stem.weight") is not None
    assert "b.weight" in {tensor.name for tensor in exported.model.graph.initializer}
    assert exported.skipped[reader(exported, "b.weight").name] == "the simulation computes it in floating point"


def test_one_layer_may_round_what_another_rounded():
    options = {"0": {"observe": "outputs"}, "1": {"threshold": 0.7}}
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    options["2"] = {"observe": "outputs"}
    model = simulated(ready(layers, dtype=torch.float32), images(), overrides=options)
    exported = export_onnx(model, images()[0])
    assert len(nodes(exported, "QuantizeLinear")) == 3
    assert [value.name for value in exported.model.graph.output] == ["conv2d_2"]
    assert_equals_simulation(model, exported, images()[0])


def test_outputs_of_a_layer_are_quantized_next_to_the_layer_that_reads_them():
    layers = [nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 4), nn.ReLU()]
    model = ready(nn.Sequential(*layers, nn.Linear(4, 2)), dtype=torch.float32)
    model, given = simulated(model, images(scale=5.0), observe="outputs"), images(scale=5.0)[0]
    exported = export_onnx(model, given)
    assert quantizer(exported, "0.weight") is None
    assert quantizer(exported, "4.weight") is not None
    assert quantizer(exported, "6.weight") is not None
    assert len(nodes(exported, "Clip")) == len(nodes(exported, "Relu")) == 1  # those that were folded are not repeated
    assert exported.skipped == {reader(exported, "0.weight").name: "the simulation does not round its input"}
    assert_equals_simulation(model, exported, given)


def test_a_constant_may_be_quantized_and_a_layer_out_of_reach_is_named():
    run = lambda net, x, more=False: x + (net.b(x) if more else net.a(net.position))  # noqa: E731
    net = Net(run, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    net.position, example = nn.Parameter(torch.zeros(3, 4)), {"x": batch(2, 3, 4, dtype=torch.float32)}
    model = simulated(ready(net, dtype=torch.float32), [example, {**example, "more": True}])
    exported = export_onnx(model, example)
    assert quantizer(exported, "a.weight") is not None
    assert skipped_layers(exported) == {"b": "the example does not reach it"}
    assert_equals_simulation(model, exported, example)


def test_a_rectifier_stays_behind_a_layer_whose_range_goes_beyond_it():
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1))
    coarse = {"0": {"threshold": 8.05}}  # 6 is rounded to 6.02
    model = simulated(ready(layers, dtype=torch.float32), images(scale=9.0), observe="outputs", overrides=coarse)
    assert_equals_simulation(model, export_onnx(model, images()[0]), images(scale=9.0)[0])


def test_padding_comes_before_the_quantizer():
    _, exported, _ = small("padding_modes")
    assert len(nodes(exported, "Pad")) == 3
    assert all(producer(exported, node.input[0]).op_type == "DequantizeLinear" for node in nodes(exported, "Conv"))


def test_a_branch_stays_in_floating_point_and_what_it_reads_is_not_rounded():
    branch = lambda y: torch.cond(y.sum() > 0, lambda y: y + 1.0, lambda y: y - 1.0, (y,))  # noqa: E731
    net = ready(Net(lambda net, x: net.b(branch(net.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 3)), dtype=torch.float32)
    given = batch(5, 4, dtype=torch.float32)
    model = simulated(net, [given])
    assert_equals_simulation(model, export_onnx(model, given), given)
    with pytest.raises(InvalidInputError, match=r"layer `a` must not round what a branch of the model .* reads"):
        export_onnx(simulated(net, [given], observe="outputs"), given)


# --- by the rules of an engine ---


def test_onnxruntime_gets_all_it_can_execute_when_there_are_data():
    model, _, given = digits("residual net")
    with pytest.warns(CalibrationWarning, match="no threshold is known for its output"):
        partly = export_onnx(model, given[:1], engine="onnxruntime")
    assert all("no threshold is known" in reason for reason in partly.skipped.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # few images
        whole = export_onnx(model, given[:1], engine="onnxruntime", batches=[given[:32], given[32:]])
    assert partly.skipped
    assert not whole.skipped
    assert partly.thresholds.items() <= whole.thresholds.items()  # those of the simulation take precedence
    assert len(whole.thresholds) > len(partly.thresholds)
    expected = outputs(model, given).argmax(1)
    assert (compute(whole, given, optimize=True)[0].argmax(1) == expected).double().mean() > 0.95


def test_onnxruntime_needs_no_data_for_a_chain_and_finds_products_that_preparing_joined_with_their_bias():
    run = lambda net, x: net.fc(F.max_pool2d(net.conv(x).relu(), 2).flatten(1)[None])  # noqa: E731
    model = ready(Net(run, conv=nn.Conv2d(3, 4, 1), fc=nn.Linear(36, 2)), dtype=torch.float32)
    exported = export_onnx(simulated(model, images()), images()[0], engine="onnxruntime", dynamic_batch=False)
    assert nodes(exported, "Gemm")
    assert not exported.skipped
    assert sizes(exported) == [[4, 3, 6, 6]]


def test_batches_may_name_their_tensors_in_any_order_and_must_not_be_an_iterator():
    net, given = Net(lambda net, x, y: x + y), {"x": torch.ones(1), "y": torch.zeros(1)}
    arrays = _Arrays(net, [given, dict(reversed(given.items()))], {"x": "one", "y": "nothing"})
    for _ in range(2):
        assert list(arrays) == [{"one": 1.0, "nothing": 0.0}] * 2
    with pytest.raises(InvalidInputError, match="one-shot generator"):
        _Arrays(net, (given for _ in range(2)), {})


# --- names, shapes, files ---


def test_the_data_of_a_calibration_may_be_one_tensor():
    model, data = mlp(), torch.stack([batch(5, 4).float()] * 2)
    one, several = (export_onnx(quantize(model, given, num_bins=255), data[0]) for given in (data, [*data]))
    assert one.thresholds == several.thresholds


def test_names_are_those_of_the_arguments_and_parameters():
    _, exported, _ = small("inputs_by_name")
    assert [value.name for value in exported.model.graph.input] == ["image", "scale", "other"]
    names = {tensor.name for tensor in exported.model.graph.initializer}
    assert {"one.weight_quantized", "one.bias", "two.weight_quantized", "out.weight_quantized"} <= names
    text = exported.model.SerializeToString()
    assert b"klquant" not in text
    assert zoo.__file__.encode() not in text
    assert sizes(exported) == [["batch", 3, 8, 8], [], ["batch", 3, 8, 8]]


@pytest.mark.parametrize("name", NETWORKS)
def test_types_are_those_of_inner_tensors(name):
    _, exported, _ = digits(name)
    graph = exported.model.graph
    assert not any(value.metadata_props for value in (*graph.input, *graph.output))
    inner = {output for node in graph.node for output in node.output} - {value.name for value in graph.output}
    assert {value.name for value in graph.value_info} <= inner


def test_names_can_be_chosen():
    model = simulated(mlp(), [batch(5, 4, dtype=torch.float32)], observe="outputs")
    exported = export_onnx(model, batch(5, 4, dtype=torch.float32), input_names=["in"], output_names=["out"])
    graph = exported.model.graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["in", "out"]
    assert_equals_simulation(model, exported, batch(7, 4, dtype=torch.float32))
    with pytest.raises(InvalidInputError, match=r"`input_names` must name 1 tensors, \['input'\], got \['a', 'b'\]"):
        export_onnx(model, batch(5, 4, dtype=torch.float32), input_names=["a", "b"])


def test_a_batch_size_that_the_model_computes_with_is_warned_of():
    net = Net(lambda net, x: net.fc(x) * len(x), fc=nn.Linear(3, 2))
    model = simulated(ready(net, dtype=torch.float32), [torch.ones(4, 3)])
    with pytest.warns(CalibrationWarning, match="the batch size is fixed"):
        assert sizes(export_onnx(model, torch.ones(4, 3))) == [[4, 3]]


def test_the_model_is_written_too_and_nothing_else_happens(tmp_path, capfd, caplog):
    model, given = simulated(mlp(), [batch(5, 4, dtype=torch.float32)]), batch(5, 4, dtype=torch.float32)
    before, level = fingerprint(model), logging.getLogger("torch").level
    exported = export_onnx(model, given, tmp_path / "deep" / "model.onnx")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.onnx"]
    assert onnx.load(tmp_path / "deep" / "model.onnx") == exported.model
    assert fingerprint(model) == before
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno > logging.DEBUG]
    assert logging.getLogger("torch").level == level


# --- refusals ---


def test_a_model_that_torch_cannot_trace_is_an_error_with_its_reason(capfd):
    net = Net(lambda net, x: net.fc(x) if x.sum() > 0 else net.fc(-x), fc=nn.Linear(3, 2))
    model = simulated(ready(net, dtype=torch.float32), [torch.ones(2, 3)])
    with pytest.raises(ModelError, match="torch cannot export the model, with GuardOnDataDependentSymNode") as caught:
        export_onnx(model, torch.ones(2, 3))
    assert caught.value.__cause__ is not None
    assert capfd.readouterr() == ("", "")


class DynamicCache:
    """Keys and values, as transformers' generative models return them."""

    def __init__(self, keys):
        self.keys = keys


def test_a_model_that_returns_its_cache_is_an_error_with_the_option_to_set():
    model = Net(
        lambda net, x, use_cache=True: (net.fc(x), DynamicCache(x)) if use_cache else net.fc(x), fc=nn.Linear(4, 4)
    )
    given = [{"x": batch(2, 4, dtype=torch.float32)}]
    result = quantize(ready(model, dtype=torch.float32), given, num_bins=401)
    with pytest.raises(ModelError, match=r"DynamicCache.*use_cache=False"):
        export_onnx(result, given[0])
    assert export_onnx(result, {**given[0], "use_cache": False}).thresholds.keys() == {"x"}


def test_a_model_that_cannot_be_exported_is_refused():
    model, x = simulated(mlp(), [batch(5, 4, dtype=torch.float32)]), batch(5, 4, dtype=torch.float32)
    with pytest.raises(InvalidInputError, match="result of simulate"):
        export_onnx(mlp(), x)
    with pytest.raises(InvalidInputError, match="`engine` must be one of tensorrt, onnxruntime, openvino, got 'trt'"):
        export_onnx(model, x, engine="trt")
    with pytest.raises(InvalidInputError, match=r"layer `first` must be in float32 .* got torch\.float64"):
        export_onnx(model.double(), x)
    model.float().norm.train()
    with pytest.raises(InvalidInputError, match="got norm in training mode"):
        export_onnx(model, x)
    six = simulated(mlp(), [x], overrides={"second": {"num_bits": 6}})
    with pytest.raises(InvalidInputError, match="layer `second` must have 8 bits to be exported, got 6"):
        export_onnx(six, x)


def test_a_missing_or_old_package_is_named(monkeypatch):
    model, x = simulated(mlp(), [batch(5, 4, dtype=torch.float32)]), batch(5, 4, dtype=torch.float32)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match="onnxscript"):
        export_onnx(model, x)
    monkeypatch.setattr(torch, "__version__", "2.8.0+cu129")
    with pytest.raises(MissingDependencyError, match=r"needs torch 2.9 or later, got 2.8.0\+cu129"):
        export_onnx(model, x)


def test_operators_that_no_plan_covers_are_named():
    model, batches = zoo.load("text", torch.float32)
    found = export_onnx(simulated(model, batches), batches[0], dynamic_batch=False).skipped
    assert sorted(reason.split()[0] for reason in found.values()) == ["Gather", "LSTM"]


# Sizes that stay dynamic


def bert():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes), add_pooling_layer=False).eval()


def tokens(samples, length):
    ids = torch.randint(0, 50, (samples, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_bert_takes_sequences_of_any_length():
    data = [tokens(3, 5), tokens(2, 9)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        result = quantize(bert(), data, num_bins=255)
        names = {key: {1: "length"} for key in data[0]}
        exported = export_onnx(result, data[0], dynamic_shapes=names)
    shapes = [[size.dim_param for size in value.type.tensor_type.shape.dim] for value in exported.model.graph.input]
    assert shapes == [["batch", "length"]] * 2
    for given in (tokens(1, 1), tokens(4, 30)):
        expected = outputs(saturate_like_engines(result.model), **given)[0]
        torch.testing.assert_close(compute(exported, given)[0], expected, rtol=0, atol=1e-5)


def test_dynamic_shapes_are_checked():
    model, given = simulated(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), images()), images()[0]
    exported = export_onnx(model, given, dynamic_batch=False, dynamic_shapes={"input": {-1: "width", 2: "height"}})
    (shape,) = [value.type.tensor_type.shape.dim for value in exported.model.graph.input]
    assert [size.dim_param or size.dim_value for size in shape] == [4, 3, "height", "width"]
    for message, wrong in {
        "must name inputs": {"x": {1: "n"}},
        "dimensions of a tensor of 4, got 4": {"input": {4: "n"}},
        "names of sizes, got 7": {"input": {2: 7}},
    }.items():
        with pytest.raises(InvalidInputError, match=message):
            export_onnx(model, given, dynamic_shapes=wrong)


def test_a_size_that_the_model_fixes_is_warned_of():
    net = ready(Net(lambda net, x: net.fc(x), fc=nn.Linear(4, 2)), dtype=torch.float32)
    given = batch(5, 4, dtype=torch.float32)
    with pytest.warns(CalibrationWarning, match="`width`, dimension 1 of input `input`, is fixed"):
        export_onnx(simulated(net, [given]), given, dynamic_batch=False, dynamic_shapes={"input": {1: "width"}})
