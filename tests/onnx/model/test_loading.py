"""Untrusted models: files elsewhere are not read, and models that would grow are refused before they do."""

import os
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from klquant.backends.onnx import check_tensorrt, inspect, prepare
from klquant.backends.onnx.model import loading as reading
from klquant.backends.onnx.model.graph import to_array
from klquant.errors import InvalidInputError
from support.onnx_models import build
from tools.fuzz import seeds

READERS = {"prepare": prepare, "inspect": lambda model: inspect(model, "tensorrt"), "check": check_tensorrt}
everywhere = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@pytest.fixture
def folder(tmp_path):
    """A folder for a model, with a secret file beside it."""
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def written(folder, data):
    (folder / "m.onnx").write_bytes(data)
    return folder / "m.onnx"


def outside(folder, location, **entries):
    """Write a model with a weight in another file."""
    model = onnx.ModelProto.FromString(seeds.outside(location))
    for entry in model.graph.initializer[0].external_data:
        entry.value = entries.get(entry.key, entry.value)
    return written(folder, model.SerializeToString())


@everywhere
def test_weights_beside_the_model_are_read(folder, read):
    (folder / "w.bin").write_bytes(bytes(64))
    read(outside(folder, "w.bin"))


@everywhere
@pytest.mark.parametrize("location", ["../secret.bin", "{}/secret.bin", "/etc/passwd", "/dev/zero", "", ".", "nothing"])
def test_files_elsewhere_are_not_read(folder, read, location):
    with pytest.raises(InvalidInputError, match=r"m\.onnx` must"):
        read(outside(folder, location.format(folder.parent)))


@everywhere
@pytest.mark.parametrize("kind", ["link", "linked folder", "device", "pipe"])
def test_links_and_devices_are_not_followed(folder, read, kind):
    target = {"link": "../secret.bin", "linked folder": "..", "device": "/dev/zero"}.get(kind)
    os.mkfifo(folder / "w") if target is None else (folder / "w").symlink_to(target)
    with pytest.raises(InvalidInputError, match=r"m\.onnx` must"):
        read(outside(folder, "w/secret.bin" if kind == "linked folder" else "w"))


@everywhere
@pytest.mark.parametrize(
    "entry", [{"length": "1000000000000"}, {"offset": "-1"}, {"offset": "1" * 30}, {"length": "x"}]
)
def test_bytes_that_are_not_in_the_file_are_not_read(folder, read, entry):
    (folder / "w.bin").write_bytes(bytes(64))
    with pytest.raises(InvalidInputError, match=r"m\.onnx` must"):
        read(outside(folder, "w.bin", **entry))


@everywhere
def test_many_weights_of_the_same_bytes_count_each(folder, read, monkeypatch):
    monkeypatch.setattr(reading, "MAX_BYTES", 0)
    (folder / "w.bin").write_bytes(bytes(64))
    model = onnx.ModelProto.FromString(seeds.outside("w.bin"))
    for k, refused in enumerate((False, True)):
        model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
        model.graph.initializer[-1].name = f"w{k}"
        path = written(folder, model.SerializeToString())
        if refused:
            with pytest.raises(
                InvalidInputError, match="weights must take at most 128 bytes, given files of 64, got 192"
            ):
                read(path)
        else:
            read(path)


@everywhere
@pytest.mark.parametrize("given", [onnx.ModelProto.FromString, None], ids=["model", "file"])
def test_functions_that_call_each_other_twice_are_counted_and_not_inlined(folder, read, given):
    read(given(seeds.functions(3)) if given else written(folder, seeds.functions(3)))
    with pytest.raises(InvalidInputError, match=r"a graph must have at most 100000 nodes.* got 549755813888"):
        read(given(seeds.functions(40)) if given else written(folder, seeds.functions(40)))


@everywhere
def test_functions_that_call_themselves_are_refused(read):
    model = onnx.ModelProto.FromString(seeds.functions(2))
    model.functions[0].node[0].op_type, model.functions[0].node[0].domain = "f1", "mine"
    model.functions[0].opset_import.add(domain="mine", version=1)
    with pytest.raises(InvalidInputError, match="cycle"):
        read(model)


@everywhere
@pytest.mark.parametrize("letter", [b"Relu", b"first", b"inner"])
def test_names_that_are_not_text_are_refused(folder, read, letter):
    """protobuf returns bytes for them and raises no error."""
    data = build("float[n] x", "float y", "first = Relu(x) inner = Neg(first) y = Neg(inner)").SerializeToString()
    read(onnx.ModelProto.FromString(data))
    with pytest.raises(InvalidInputError, match="names must be Unicode text, got b'"):
        read(written(folder, data.replace(letter, b"\xff" * len(letter))))


@everywhere
def test_a_graph_with_a_cycle_is_refused(read):
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17]> graph (float[n, 2] x) => (float[n, 2] y)
        { a = Relu(b) b = Relu(a) y = Add(x, b) }""")
    with pytest.raises(InvalidInputError, match="cycle"):
        read(model)


@pytest.mark.parametrize("read", [READERS["inspect"], READERS["check"]])
def test_an_operator_that_only_has_the_name_of_an_onnx_operator_is_named(read):
    model = parser.parse_model("""<ir_version: 8, opset_import: ["": 17, "mine": 1]>
        graph (float[n, 2] x) => (float[n, 2] y) { y = mine.Conv(x) }""")
    with pytest.raises(InvalidInputError, match="`model` must be a valid ONNX model, got: Conv of domain `mine`"):
        read(model)


@pytest.mark.parametrize("body", ["r = Tile(k, a)", "r = Expand(k, a)", "r = ConstantOfShape(a)"])
def test_a_constant_that_would_be_huge_stays_a_computation(body):
    huge = build("float[n] x", "float y", f"{body} y = Add(x, r)", k=np.ones(1, np.float32), a=np.array([100_000_000]))
    small = build("float[n] x", "float y", f"{body} y = Add(x, r)", k=np.ones(1, np.float32), a=np.array([400]))
    assert len(prepare(small).graph.nodes) == 1
    assert len(limited(huge)) == 2


def limited(model):
    """Return the operators of the prepared model, made by a process with little memory."""
    code = (
        "import resource, sys, onnx\nfrom klquant.backends.onnx import prepare\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**29,) * 2)\n"
        "model = onnx.load_from_string(sys.stdin.buffer.read())\n"
        "print(*[node.op_type for node in prepare(model).graph.nodes])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=model.SerializeToString(), capture_output=True, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize("change", [{"raw_data": b"123"}, {"data_type": 255}, {"dims": [7]}], ids=str)
def test_a_constant_that_is_not_what_it_says_is_named(change):
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "w")
    assert to_array(tensor).tolist() == [1, 1, 1]
    tensor.MergeFrom(onnx.TensorProto(**change))
    with pytest.raises(InvalidInputError, match="constant `w` must fit its type and shape"):
        to_array(tensor)


@pytest.mark.parametrize("operator", ["Concat<axis = 0>(a{0}, a{0})", "Reshape(a{0}, s)", "Relu(a{0})"])
def test_time_is_not_quadratic_in_the_length_of_a_chain(operator):
    nodes = " ".join(f"a{k + 1} = {operator.format(k)}" for k in range(2000))
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]> graph (float[n, 4] x) => (float[k, 4] y)
        <float t = {{0.1}}, int8 z = {{0}}, int64[2] s = {{-1, 4}}>
        {{ q = QuantizeLinear(x, t, z) a0 = DequantizeLinear(q, t, z) {nodes} y = Neg(a2000) }}""")
    start = time.process_time()
    assert len(inspect(model, "tensorrt")) == 2001
    assert time.process_time() - start < 10


def test_text_files_are_refused(folder):
    (folder / "m.onnxtxt").write_text("<ir_version: 8> g () => () {}")
    with pytest.raises(InvalidInputError, match=r"m\.onnxtxt` must be a valid ONNX model"):
        prepare(folder / "m.onnxtxt")
