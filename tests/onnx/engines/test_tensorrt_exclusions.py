import pytest

from klquant.backends.onnx import prepare, quantize, slow_in_tensorrt
from support.onnx_models import build


def conv(outputs, inputs, kernel=(3, 3), group=1, first=False):
    body = "y = Conv(x, w)" if first else "r = Relu(x) y = Conv(r, w)"
    body = body.replace("Conv", f"Conv<group={group}>")
    return build(f"float[n, {inputs * group}, 8, 8] x", "float y", body, w=(outputs, inputs, *kernel))


@pytest.mark.parametrize(
    ("model", "slow"),
    [
        (conv(16, 16), False),
        (conv(15, 64), False),
        (conv(15, 20), True),
        (conv(8, 64), False),
        (conv(64, 8), False),
        (conv(8, 8), True),
        (conv(8, 3, first=True), False),
        (conv(7, 3, first=True), True),
        (conv(64, 3), False),
        (conv(64, 3, kernel=(1, 3)), True),
        (conv(32, 1, group=32), False),
        (conv(32, 1, kernel=(1, 1), group=32), True),
        (conv(12, 1, group=12), True),
    ],
)
def test_convolutions_of_few_channels(model, slow):
    assert [("fewer than 16" in why) for why in slow_in_tensorrt(model).values()] == [True] * slow


@pytest.mark.parametrize(
    ("inputs", "body", "slow"),
    [
        ("float[1, 32] x", "y = MatMul(x, w)", True),
        ("float[n, 32] x", "y = MatMul(x, w)", False),
        ("float[n, 32] x", "y = MatMul(x, v)", True),
        ("float[1, 5, 32] x", "y = MatMul(x, w)", False),
        ("float[1, 32] x", "y = Gemm(x, w)", True),
        ("float[2, 1, 32] x", "t = Transpose<perm=[0,2,1]>(x) y = MatMul(x, t)", True),
        ("float[2, 4, 32] x", "t = Transpose<perm=[0,2,1]>(x) y = MatMul(x, t)", False),
    ],
)
def test_products_with_one_row_or_column(inputs, body, slow):
    model = build(inputs, "float y", body, w=(32, 16), v=(32, 1))
    assert [("single row" in why) for why in slow_in_tensorrt(model).values()] == [True] * slow


def test_attention_is_optional_and_the_names_can_be_excluded():
    body = "q = MatMul(x, w) t = Transpose<perm=[0,2,1]>(q) y = MatMul(q, t)"
    model = prepare(build("float[n, 4, 32] x", "float y", body, w=(32, 32)))
    assert not slow_in_tensorrt(model)
    names = slow_in_tensorrt(model, attention=True)
    assert names == {"matmul2": "it is a product of two activations"}
    found = quantize(model, {"x": 3.0, "q": 3.0, "t": 3.0}, exclude=names)
    assert found.skipped == {"matmul2": "excluded by the settings"}
