import numpy as np
import onnx
import pytest

from klquant.backends.onnx.model.preparation import casts_halves, without_inserted_casts
from support.onnx_models import build


@pytest.mark.parametrize(
    ("inputs", "body", "constants", "expected"),
    [
        ("float[n] x", "y = Relu(x)", {}, False),
        ("float16[n] x", "y = Relu(x)", {}, False),
        ("float[n] x", "d = Cast<to = 11>(x) y = Relu(d)", {}, False),
        ("float16[n] x", "f = Cast<to = 1>(x) y = Relu(f)", {}, True),
        ("float[n] x", "h = Cast<to = 10>(x) y = Relu(h)", {}, True),
        ("int64[n] x", "h = Cast<to = 1>(x) y = Relu(h) z = Neg(w)", {"w": np.ones(1, np.float16)}, True),
    ],
)
def test_casts_matter_only_in_models_with_float16(inputs, body, constants, expected):
    outputs = "float16 y" if "16" in inputs and "to = 1" not in body else "float y"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g ({inputs}) => ({outputs}) {{ {body} }}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    assert casts_halves(model) == expected


def test_inserted_casts_go_and_names_return():
    body = "Ix = Cast<to = 1>(x) Ia = Relu(Ix) Ib = Neg(Ia) b = Cast<to = 10>(Ib) y = Exp(b)"
    model = build("float16[n] x", "float16 y", body.replace("I", "InsertedPrecisionFreeCast_"))
    for node in model.graph.node:
        node.name = f"InsertedPrecisionFreeCast_{node.output[0]}" if node.op_type == "Cast" else node.output[0]
    found = without_inserted_casts(model)
    nodes = [(node.op_type, *node.input, *node.output) for node in found.graph.node]
    assert nodes == [("Relu", "x", "a"), ("Neg", "a", "b"), ("Exp", "b", "y")]
    assert [value.name for value in found.graph.value_info] == ["b"]
