import hashlib

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from klquant.backends import onnx as backend
from klquant.backends.onnx.model.graph import read_graph
from klquant.backends.onnx.model.saving import save_model
from klquant.errors import InvalidInputError
from support import onnx_networks
from support.onnx_models import array, build, run, run_all

X = np.random.default_rng(1).normal(size=(3, 2, 6, 6)).astype(np.float32)
NORM = {"scale": (4,), "shift": (4,), "mean": (4,), "variance": np.float32([0.5, 1, 2, 3])}
WEIGHTS = {"w": (4, 2, 3, 3), "v": (4, 5), "b": (5,), **NORM}
BODY = """
    c = Conv(x, w) n = BatchNormalization(c, scale, shift, mean, variance) r = Relu(n) i = Identity(r)
    two = Constant<value = float {2.0}>() m = Mul(i, two) g = GlobalAveragePool(m) f = Flatten(g)
    p = MatMul(f, v) s = Add(p, b) y = Identity(s)
"""


def prepare(model):
    return backend.prepare(model).model


def legacy():
    """Return a network as older exporters write it."""
    return build("float[n, 2, 6, 6] x", "float y", BODY, **WEIGHTS)


def half():
    """Return the same network in float16."""
    model = legacy()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    constant = next(node for node in model.graph.node if node.op_type == "Constant")
    constant.attribute[0].t.CopyFrom(numpy_helper.from_array(np.float16(2)))
    del model.graph.value_info[:]
    return model


def old():
    """Return a network of opset 9 whose weights are inputs with defaults."""
    body = """
        c = Conv(x, w) n = BatchNormalization(c, scale, shift, mean, variance) d = Dropout(n)
        l = Clip<min = 0.0, max = 6.0>(d) a = ReduceMean<axes = [2, 3]>(l) q = Squeeze<axes = [2, 3]>(a)
        z = Unsqueeze<axes = [0]>(q) y = Softmax<axis = 2>(z)
    """
    model = build("float[n, 2, 6, 6] x", "float y", body, opset=9, **{k: v for k, v in WEIGHTS.items() if k != "v"})
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


def functions():
    """Return a network that calls a local function twice."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17, "mine": 1]>
        graph (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {1.0, 2.0, -3.0, 4.0}> {
            a = mine.layer(x, w) y = mine.layer(a, w) }
        <domain: "mine", opset_import: ["": 17]> layer (x, w) => (y) { p = MatMul(x, w) y = Relu(p) }""")
    onnx.checker.check_model(model)
    return model


def branching():
    """Return a network with a branch that reads a tensor from outside."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        graph (float[n, 2] x, bool flag) => (float[n, 2] y) <float[2, 2] w = {1.0, 2.0, -3.0, 4.0}> {
            z = Neg(a)
            b = If(flag) <then_branch = yes () => (float[n, 2] t) { t = Relu(a) },
                          else_branch = no () => (float[n, 2] e) { e = Identity(z) }>
            y = Add(b, z)
            a = MatMul(x, w)
        }""")
    nodes = [model.graph.node[k] for k in (3, 0, 1, 2)]
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(ordered)
    onnx.checker.check_model(model)
    return model


def content(model):
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def kinds(model):
    return [node.op_type for node in model.graph.node]


MODELS = {name: lambda name=name: onnx_networks.load(name) for name in ("VGG", "residual net", "MobileNetV2")}
MODELS |= {"legacy": legacy, "half": half, "old": old, "functions": functions, "branching": branching}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_bytes_every_time_and_preparing_twice_changes_nothing(name):
    model = MODELS[name]()
    before = content(model)
    prepared = prepare(model)
    assert content(prepared) == content(prepare(model)) == content(prepare(prepared))
    assert content(model) == before


def test_an_old_model_that_is_not_valid_is_refused_before_it_is_converted():
    """The converter of onnx does not check the types of attributes and crashes."""
    model = old()
    squeeze = next(node for node in model.graph.node if node.op_type == "Squeeze")
    squeeze.attribute[0].CopyFrom(onnx.helper.make_attribute("axes", "text"))
    with pytest.raises(InvalidInputError, match=r"must have opset 13.*Mismatched attribute type.*axes"):
        prepare(model)


@pytest.mark.parametrize("name", MODELS)
def test_inputs_and_outputs_stay_and_every_node_has_a_unique_name(name):
    model, prepared = MODELS[name](), prepare(MODELS[name]())
    assert read_graph(prepared).inputs == read_graph(model).inputs
    assert read_graph(prepared).outputs == read_graph(model).outputs
    names = [node.name for node in prepared.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert next(entry.version for entry in prepared.opset_import if not entry.domain) >= 13
    onnx.checker.check_model(prepared, full_check=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_type_of_every_tensor_is_known(name):
    graph = read_graph(prepare(MODELS[name]()))
    assert all(graph.types.get(output) for node in graph.nodes for output in node.output)


@pytest.mark.parametrize("make", [legacy, old])
def test_constants_identities_and_norms_go_and_the_function_stays(make):
    model, prepared = make(), prepare(make())
    assert not {"Constant", "Identity", "BatchNormalization", "Dropout"} & set(kinds(prepared))
    np.testing.assert_allclose(run(prepared, x=X)["y"], run(model, x=X)["y"], rtol=1e-5, atol=1e-6)


def test_the_nodes_of_a_prepared_legacy_model():
    prepared = prepare(legacy())
    assert kinds(prepared) == ["Conv", "Relu", "Mul", "GlobalAveragePool", "Flatten", "Gemm"]
    assert [node.output[0] for node in prepared.graph.node] == ["n", "r", "m", "g", "f", "y"]
    assert array(prepared, "two") == 2
    assert [entry.domain for entry in prepared.opset_import] == [""]


def test_tensors_that_stay_have_the_values_that_they_had():
    before, after = run_all(legacy(), x=X), run_all(prepare(legacy()), x=X)
    assert after.keys() == {"n", "r", "m", "g", "f", "y"}
    for name, tensor in after.items():
        np.testing.assert_allclose(tensor, before[name], rtol=1e-5, atol=1e-5)


def test_an_old_model_is_raised_and_its_weights_are_no_inputs():
    prepared = prepare(old())
    assert [value.name for value in prepared.graph.input] == ["x"]
    assert [entry.version for entry in prepared.opset_import] == [13]
    assert prepared.ir_version == 7


def test_a_newer_model_keeps_its_opset():
    assert [entry.version for entry in prepare(legacy()).opset_import] == [17]
    assert prepare(legacy()).ir_version == 8


def test_nodes_come_in_the_order_in_which_they_were_given():
    model = onnx_networks.load("residual net")
    expected = [output for node in model.graph.node for output in node.output]
    assert [output for node in prepare(model).graph.node for output in node.output] == expected


def test_functions_are_inlined():
    model, prepared = functions(), prepare(functions())
    assert kinds(prepared) == ["MatMul", "Relu", "MatMul", "Relu"]
    assert not prepared.functions
    assert [entry.domain for entry in prepared.opset_import] == [""]
    x = X.reshape(-1, 2)
    np.testing.assert_array_equal(run(prepared, x=x)["y"], run(model, x=x)["y"])


@pytest.mark.parametrize("flag", [True, False])
def test_branches_stay(flag):
    x = X.reshape(-1, 2)
    expected = run(branching(), x=x, flag=np.array(flag))["y"]
    np.testing.assert_array_equal(run(prepare(branching()), x=x, flag=np.array(flag))["y"], expected)


def test_equal_constants_keep_separate_names():
    body = "a = Mul(x, two) b = Relu(a) c = Mul(b, zwei) y = Softmax(c)"
    prepared = prepare(build("float[n, 3] x", "float y", body, two=np.float32(2), zwei=np.float32(2)))
    assert [node.input[1] for node in prepared.graph.node if node.op_type == "Mul"] == ["two", "zwei"]


def test_other_operators_are_not_made_of_those_of_the_model():
    body = "d = Div(x, root) e = Erf(d) o = Add(e, one) p = Mul(x, o) y = Mul(p, half)"
    constants = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    prepared = prepare(build("float[n, 3] x", "float y", body, opset=20, **constants))
    assert kinds(prepared) == ["Div", "Erf", "Add", "Mul", "Mul"]


# --- float16 ---


def test_float16_stays_float16_without_casts():
    prepared = prepare(half())
    assert kinds(prepared) == kinds(prepare(legacy()))
    assert set(read_graph(prepared).types.values()) == {TensorProto.FLOAT16}
    x = X.astype(np.float16)
    np.testing.assert_allclose(run(prepared, x=x)["y"], run(half(), x=x)["y"], rtol=0.02, atol=0.02)


def test_mixed_precision_stays_as_it_is():
    body = "h = Cast<to = 10>(x) p = MatMul(h, w) f = Cast<to = 1>(p) i = Identity(f) y = Softmax(i)"
    model = build("float[n, 3] x", "float y", body, w=np.eye(3, dtype=np.float16))
    assert kinds(prepare(model)) == kinds(model)


def test_a_tensor_of_float16_may_leave_the_model_on_its_way():
    body = "a = MatMul(x, w) r = Relu(a) f = Reshape(r, s) y = MatMul(f, w)"
    model = build("float16[n, 3] x", "float16 r, float16 y", body, w=np.eye(3, dtype=np.float16), s=[-1, 3])
    nodes, expected = prepare(model).graph.node, model.graph.node
    assert [(*node.input, *node.output) for node in nodes] == [(*node.input, *node.output) for node in expected]


def test_bfloat16_is_refused():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        graph (bfloat16[n, 2] x) => (bfloat16[n, n] y) { t = Transpose(x) y = MatMul(x, t) }""")
    with pytest.raises(InvalidInputError, match="`model` must be a model that onnxruntime can run, got: "):
        prepare(model)


# --- files ---


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_models_may_be_files(tmp_path, as_path):
    path = tmp_path / "model.onnx"
    onnx.save(legacy(), path)
    assert content(prepare(as_path(path))) == content(prepare(legacy()))


def test_weights_may_lie_beside_the_model(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save_model(legacy(), path, save_as_external_data=True, location="weights", size_threshold=0)
    assert (tmp_path / "weights").stat().st_size > 0
    assert content(prepare(path)) == content(prepare(legacy()))


def test_external_weights_of_a_model_in_memory_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save_model(legacy(), path, save_as_external_data=True, location="weights", size_threshold=0)
    with pytest.raises(InvalidInputError, match="weights must be loaded, got `w` in another file; pass the path"):
        prepare(onnx.load(path, load_external_data=False))


def test_missing_weights_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save_model(legacy(), path, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    with pytest.raises((InvalidInputError, FileNotFoundError), match="weights"):
        prepare(path)


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        prepare(tmp_path / "nowhere.onnx")


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"no model", lambda b: b[9:]])
def test_damaged_files_are_refused_by_name(tmp_path, damage):
    path = tmp_path / "model.onnx"
    path.write_bytes(damage(legacy().SerializeToString()))
    with pytest.raises(InvalidInputError, match=r"model.onnx` must be a valid ONNX model, got: ") as caught:
        prepare(path)
    assert caught.value.__cause__ is not None


# --- what cannot be prepared ---


def test_only_models_and_paths_are_taken():
    with pytest.raises(InvalidInputError, match=r"`model` must be an onnx.ModelProto or a path, got bytes"):
        prepare(legacy().SerializeToString())


def test_an_invalid_graph_is_refused():
    model = legacy()
    model.graph.node[0].input[0] = "unknown"
    with pytest.raises(InvalidInputError, match=r"`model` must be a valid ONNX model, got: .*unknown"):
        prepare(model)


def quantized():
    body = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Relu(d)"
    return build("float[n, 3] x", "float y", body, s=np.float32(1), z=np.int8(0))


def quantized_inside():
    model = branching()
    body = next(node for node in model.graph.node if node.op_type == "If").attribute[0].g
    body.node.add(op_type="DynamicQuantizeLinear", name="inner", input=["a"], output=["q", "s", "z"])
    return model


def quantized_in_a_function():
    model = functions()
    model.functions[0].node.add(op_type="MatMulInteger", name="inner", input=["x", "w"], output=["q"])
    return model


@pytest.mark.parametrize("make", [quantized, quantized_inside, quantized_in_a_function])
def test_quantized_models_are_refused(make):
    expected = r"`model` must be a float model, got \w+ in node `(quantizelinear0|inner)`"
    with pytest.raises(InvalidInputError, match=expected):
        prepare(make())


def test_an_opset_that_cannot_be_raised_is_refused():
    model = onnx.parser.parse_model("""<ir_version: 3, opset_import: ["": 8]>
        graph (float[1, 2] x) => (float[1, 2] y) { y = Scan<num_scan_inputs = 1>(x) }""")
    with pytest.raises(InvalidInputError, match="`model` must have opset 13, or one that onnx can raise to it, got: "):
        prepare(model)


def test_operators_that_onnxruntime_does_not_know_are_refused():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17, "other": 1]>
        graph (float[n, 2] x) => (float[n, 2] y) { y = other.Strange(x) }""")
    with pytest.raises(InvalidInputError, match=r"`model` must be a model that onnxruntime can run, got: .*Strange"):
        prepare(model)


# --- saving ---


@pytest.mark.parametrize("max_bytes", [2_000_000_000, 100])
@pytest.mark.parametrize("old_files", [(), ("model.onnx",), ("model.onnx", "model.onnx.data")])
def test_models_are_saved_in_one_file_or_two(tmp_path, max_bytes, old_files):
    path, model = tmp_path / "deep" / "model.onnx", prepare(onnx_networks.load("VGG"))
    path.parent.mkdir(exist_ok=True)
    for name in old_files:
        path.with_name(name).write_text("old")
    before = content(model)
    save_model(model, str(path), max_bytes=max_bytes)
    assert content(prepare(path)) == content(model) == before
    written = {"model.onnx"} if max_bytes > 100 else {"model.onnx", "model.onnx.data"}
    assert {file.name for file in path.parent.iterdir()} == {*written, *old_files}
    assert (path.stat().st_size > 100_000) == (max_bytes > 100)


def test_a_failed_save_keeps_the_old_file_and_leaves_no_others(tmp_path, monkeypatch):
    path, model = tmp_path / "model.onnx", prepare(onnx_networks.load("VGG"))
    path.write_text("old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("the disk is full")))
    for max_bytes in (100, 2_000_000_000):
        with pytest.raises(OSError, match="the disk is full"):
            save_model(model, path, max_bytes=max_bytes)
        assert path.read_text() == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_files_in_the_working_directory_are_not_touched(tmp_path, monkeypatch):
    """Torch's exporter leaves `model.onnx.data` beside `model.onnx`."""
    monkeypatch.chdir(tmp_path)
    for name in ("model.onnx.data", "given.onnx.data", "optimized.onnx.data"):
        (tmp_path / name).write_bytes(b"mine")
    model = prepare(onnx_networks.load("VGG"))
    save_model(model, tmp_path / "other" / "model.onnx", max_bytes=0)
    assert content(prepare(tmp_path / "other" / "model.onnx")) == content(model)
    assert (tmp_path / "model.onnx.data").read_bytes() == b"mine"
