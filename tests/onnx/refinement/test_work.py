import numpy as np
import pytest

from klquant.backends.onnx import calibrate, inspect, prepare, quantize
from klquant.backends.onnx.placement import find_ranges
from klquant.backends.onnx.refinement.layer_choice import _Refinement
from klquant.backends.onnx.refinement.place import Place, Refined
from klquant.backends.onnx.refinement.range_choices import Base
from klquant.backends.onnx.refinement.work import MANY, work_of
from support.onnx_models import build, run

FUNCTION = "s{k} = Sigmoid (a{k}) m{k} = Mul (a{k}, s{k}) n{k} = Mul (m{k}, s{k}) r{k} = Sub (n{k}, m{k})"
LAYERS = 6


def chain(channels, kernel):
    """Return a chain of convolutions with a function between them."""
    pads = kernel // 2
    body = " ".join(
        f"a{k} = Conv <pads = [{pads}, {pads}, {pads}, {pads}]> ({f'r{k - 1}' if k else 'x'}, w{k}) "
        + FUNCTION.format(k=k)
        for k in range(LAYERS)
    )
    rng, size = np.random.default_rng(0), channels * kernel**2
    shape = (channels, channels, kernel, kernel)
    weights = {f"w{k}": rng.normal(size=shape, scale=2 / size**0.5).astype(np.float32) for k in range(LAYERS)}
    body += " y = Conv (r5, w)"
    kind = f"float[n, {channels}, 8, 8]"
    return prepare(build(f"{kind} x", "float[n, 4, 8, 8] y", body, **weights, w=(4, channels, 1, 1)))


def batches(channels, seed=0, number=4):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(4, channels, 8, 8)).astype(np.float32) for _ in range(number)]


def test_multiplications_and_values_are_counted():
    work = work_of(chain(8, 3), {"x": batches(8)[0]})
    positions = 4 * 8 * 8
    assert list(work.multiplications.values()) == [positions * 8 * 8 * 9] * LAYERS + [positions * 4 * 8]
    assert work.values == positions * 8 * LAYERS
    assert len(work.functions) == 4 * LAYERS


@pytest.mark.parametrize(
    ("body", "shape", "multiplications"),
    [
        ("y = Conv <group = 8> (x, w)", (8, 1, 3, 3), 8 * 6 * 6 * 9),
        ("y = ConvTranspose (x, w)", (8, 5, 3, 3), 5 * 10 * 10 * 8 * 9),
        ("y = MatMul (x, w)", (8, 3), 8 * 8 * 3 * 8),
        ("f = Flatten (x) y = Gemm (f, w)", (512, 3), 512 * 3),
    ],
)
def test_multiplications_of_each_kind_of_layer(body, shape, multiplications):
    output = "float[1, 3] y" if "Gemm" in body else "float[1, c, h, w] y"
    work = work_of(prepare(build("float[1, 8, 8, 8] x", output, body, w=shape)), {"x": batches(8)[0][:1]})
    assert list(work.multiplications.values()) == [multiplications]


def test_what_layers_absorb_is_no_function():
    body = "a = Conv (x, w) r = Relu (a) y = Conv (r, v)"
    prepared = prepare(build("float[1, 8, 8, 8] x", "float[1, 8, 8, 8] y", body, w=(8, 8, 1, 1), v=(8, 8, 1, 1)))
    work = work_of(prepared, {"x": batches(8)[0][:1]})
    assert (work.functions, work.values) == ((), 0)
    assert not work.functions_are_cheap()


def test_functions_are_cheap_beside_many_multiplications():
    few, many = (work_of(chain(c, k), {"x": batches(c)[0]}) for c, k in ((8, 3), (16, 3)))
    assert sum(few.multiplications.values()) < MANY * few.values
    assert not few.functions_are_cheap()
    assert many.functions_are_cheap()


@pytest.mark.parametrize("least", [0.9, 0.5])
def test_cheap_functions_stay_in_floating_point_where_the_outputs_are_better_by_it(least):
    prepared, options = chain(16, 3), {"engine": "onnxruntime", "batches": batches(16)}
    calibration = calibrate(prepared, batches(16))
    found, plain = (quantize(prepared, calibration, min_int8=share, **options) for share in (least, 1))
    ran = [node.name for node in inspect(found.model, "onnxruntime") if node.op_type in ("Sigmoid", "Mul", "Sub")]
    assert set(found.float_nodes) <= set(ran)
    assert found.float_nodes
    assert f"{len(found.float_nodes)} nodes without weights in float" in repr(found)
    assert not plain.float_nodes
    x = np.concatenate(batches(16, seed=1))
    floats, *got = (run(model, x=x)["y"] for model in (prepared.model, found.model, plain.model))
    noise, more = (np.square(floats - one).sum() for one in got)
    assert noise < 0.5 * more


@pytest.fixture
def tried(monkeypatch):
    """Return what `quantize` will have tried."""
    found = []

    def seen(self, bases):
        found.extend(refine(self, bases))
        return found

    refine = _Refinement.refine
    monkeypatch.setattr(_Refinement, "refine", seen)
    return found


@pytest.mark.parametrize(
    ("channels", "engine", "numbers"),
    [(16, "onnxruntime", {0, 4 * LAYERS}), (8, "onnxruntime", {0}), (16, "openvino", {0})],
)
def test_functions_in_floating_point_are_tried_where_they_are_cheap_and_quantized(tried, channels, engine, numbers):
    prepared, data = chain(channels, 3), batches(channels)
    quantize(prepared, calibrate(prepared, data), engine=engine, batches=data, adaround=False)
    assert {len(one.functions) for one in tried} == numbers


def separable():
    """Return a network of ten convolutions, and the names of the five of them that are depthwise."""
    dense, depthwise = "(r{k}, w)", "<group = 16, pads = [1, 1, 1, 1]> (r{k}, d)"
    body = "r0 = Conv (x, w) " + " ".join(
        f"a{k} = Conv {(dense if k % 2 else depthwise).format(k=k)} r{k + 1} = Sigmoid (a{k})" for k in range(9)
    )
    rng = np.random.default_rng(0)
    shapes = {"w": (16, 16, 1, 1), "d": (16, 1, 3, 3)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    prepared = prepare(build("float[n, 16, 8, 8] x", "float[n, 16, 8, 8] r9", body, **weights))
    names = [node.name for node in prepared.graph.nodes if node.op_type == "Conv"]
    return prepared, names[1::2]


@pytest.mark.parametrize(("least", "number"), [(1, 0), (0.8, 2), (0.65, 3), (0.6, 4), (0.4, 5), (0, 5)])
def test_depthwise_convolutions_are_left_out_as_far_as_enough_layers_stay_in_int8(least, number):
    (prepared, depthwise), data = separable(), batches(16)
    ranges = find_ranges(prepared, calibrate(prepared, data), "onnxruntime", asymmetric=True)
    where = Place(prepared, "onnxruntime", (), lambda placed: prepared.model)
    refinement = _Refinement(where, [], [], least, work_of(prepared, {"x": data[0]}))
    found = refinement._depthwise(Refined(Base(prepared, [ranges]), ranges))
    assert len(depthwise) == 5
    assert found == ([] if number == 0 else [tuple(depthwise[:number]), tuple(depthwise[-number:])])


def test_depthwise_convolutions_are_tried_with_functions_in_floating_point(tried):
    prepared = mobile()
    rng = np.random.default_rng(0)
    data = [rng.normal(size=(4, 32, 8, 8)).astype(np.float32) for _ in range(4)]
    found = quantize(prepared, calibrate(prepared, data), engine="onnxruntime", batches=data, min_int8=0.75)
    layers = [node.name for node in prepared.graph.nodes if node.op_type == "Conv"]
    depthwise = layers[1::2]
    names = [one.left_out for one in tried if one.functions]
    assert tuple(depthwise[:2]) in names
    assert tuple(depthwise[-2:]) in names
    assert not any(set(depthwise) & set(one.left_out) for one in tried if not one.functions and len(one.left_out) == 2)
    ran = [node.int8 for node in inspect(found.model, "onnxruntime") if node.op_type == "Conv"]
    assert sum(ran) >= 0.75 * len(layers)


def mobile():
    """Return a network of dense 3 x 3 and depthwise convolutions in turns, with a function behind each."""
    body, last = "", "x"
    for k in range(8):
        how, weight = (", group = 32", "d") if k % 2 else ("", "w")
        body += f"a{k} = Conv <pads = [1, 1, 1, 1]{how}> ({last}, {weight}) {FUNCTION.format(k=k)} "
        last = f"r{k}"
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(size=(32, 32, 3, 3), scale=0.1).astype(np.float32),
        "d": rng.normal(size=(32, 1, 3, 3), scale=0.6).astype(np.float32),
    }
    return prepare(build("float[n, 32, 8, 8] x", f"float[n, 32, 8, 8] {last}", body, **weights))
