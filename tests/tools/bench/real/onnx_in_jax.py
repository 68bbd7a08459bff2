"""ONNX models as JAX functions of their weights and inputs: the operators of the networks here, and no others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax import lax
from onnx import numpy_helper

Array = Any


class Network(NamedTuple):
    """A function ``run(params, *inputs)``, which returns a tuple, and its weights."""

    run: Callable[..., tuple[Array, ...]]
    params: dict[str, Array]
    inputs: list[str]


def load(path: Path) -> Network:
    """Read a model. Floating-point initializers are the weights; shapes are computed while JAX traces."""
    graph = onnx.load(path).graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    params = {name: value for name, value in constants.items() if value.dtype == np.float32 and value.ndim}
    inputs = [each.name for each in graph.input if each.name not in constants]

    def run(params: dict[str, Array], *given: Array) -> tuple[Array, ...]:
        values = {**constants, **params, **dict(zip(inputs, given, strict=True)), "": None}
        for node in graph.node:
            options = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
            values[node.output[0]] = apply(node.op_type, [values[name] for name in node.input], options)
        return tuple(values[each.name] for each in graph.output)

    return Network(run, params, inputs)


def apply(kind: str, inputs: list[Array], options: dict[str, Any]) -> Array:
    """Return the first result of an operator; with NumPy where all inputs are known, as sizes are."""
    known = all(value is None or isinstance(value, np.ndarray | np.generic) for value in inputs)
    return OPERATORS[kind](np if known else jnp, options, *inputs)


def conv(xp: Any, options: dict[str, Any], x: Array, w: Array, b: Array = None) -> Array:
    pads = window_pads(options, x.ndim - 2)
    strides, dilations = (options.get(name, [1] * (x.ndim - 2)) for name in ("strides", "dilations"))
    y = lax.conv_general_dilated(
        x, w, strides, pads, rhs_dilation=dilations, feature_group_count=options.get("group", 1)
    )
    return y if b is None else y + b.reshape(1, -1, *[1] * (x.ndim - 2))


def conv_transpose(xp: Any, options: dict[str, Any], x: Array, w: Array, b: Array = None) -> Array:
    strides, sizes = options.get("strides", [1, 1]), w.shape[2:]
    pads = [(size - 1 - low, size - 1 - high) for size, (low, high) in zip(sizes, window_pads(options, 2), strict=True)]
    turned = w[:, :, ::-1, ::-1].swapaxes(0, 1)
    y = lax.conv_general_dilated(x, turned, (1, 1), pads, lhs_dilation=strides)
    return y if b is None else y + b.reshape(1, -1, 1, 1)


def window_pads(options: dict[str, Any], count: int) -> list[tuple[int, int]]:
    assert options.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
    pads = options.get("pads", [0] * 2 * count)
    return list(zip(pads[:count], pads[count:], strict=True))


def max_pool(xp: Any, options: dict[str, Any], x: Array) -> Array:
    size, strides = options["kernel_shape"], options.get("strides", [1, 1])
    if options.get("auto_pad") == b"SAME_UPPER":
        return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, *size), (1, 1, *strides), "SAME")
    pads = [list(pair) for pair in window_pads(options, 2)]
    if options.get("ceil_mode"):
        for k, pair in enumerate(pads):
            pair[1] += -(x.shape[2 + k] + sum(pair) - size[k]) % strides[k]
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, *size), (1, 1, *strides), [(0, 0), (0, 0), *map(tuple, pads)])


def batch_norm(xp: Any, options: dict[str, Any], x: Array, *statistics: Array) -> Array:
    scale, bias, mean, variance = (each.reshape(1, -1, *[1] * (x.ndim - 2)) for each in statistics)
    return (x - mean) / xp.sqrt(variance + options.get("epsilon", 1e-5)) * scale + bias


def layer_norm(xp: Any, options: dict[str, Any], x: Array, scale: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / xp.sqrt((centred**2).mean(-1, keepdims=True) + options.get("epsilon", 1e-5)) * scale + bias


def gemm(xp: Any, options: dict[str, Any], a: Array, b: Array, c: Array) -> Array:
    a, b = (x.T if options.get(name) else x for x, name in ((a, "transA"), (b, "transB")))
    return a @ b + c


def reshape(xp: Any, options: dict[str, Any], x: Array, shape: Array) -> Array:
    return x.reshape([x.shape[k] if size == 0 else int(size) for k, size in enumerate(shape)])


def cut(
    xp: Any, options: dict[str, Any], x: Array, begin: Array, end: Array, axes: Array, steps: Array = None
) -> Array:
    index = [slice(None)] * x.ndim
    for k, axis in enumerate(axes):
        index[axis] = slice(int(begin[k]), max(int(end[k]), -(2**31)), 1 if steps is None else int(steps[k]))
        if int(end[k]) <= -(2**31):
            index[axis] = slice(int(begin[k]), None, int(steps[k]))
    return x[tuple(index)]


def pad(xp: Any, options: dict[str, Any], x: Array, pads: Array, *rest: Array) -> Array:
    return xp.pad(x, list(zip(pads[: x.ndim].tolist(), pads[x.ndim :].tolist(), strict=True)))


def unsqueeze(xp: Any, options: dict[str, Any], x: Array, axes: Array) -> Array:
    return xp.expand_dims(x, tuple(int(axis) for axis in axes))


def clip(xp: Any, options: dict[str, Any], x: Array, low: Array = None, high: Array = None) -> Array:
    return xp.clip(x, options.get("min", low), options.get("max", high))


def expand(xp: Any, options: dict[str, Any], x: Array, shape: Array) -> Array:
    return xp.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(map(int, shape))))


def cast(xp: Any, options: dict[str, Any], x: Array) -> Array:
    return x.astype(onnx.helper.tensor_dtype_to_np_dtype(options["to"]))


def filled(xp: Any, options: dict[str, Any], shape: Array) -> Array:
    value = numpy_helper.to_array(options["value"]) if "value" in options else np.zeros(1, np.float32)
    return np.full([int(size) for size in shape], value[0])


def constant(xp: Any, options: dict[str, Any]) -> Array:
    [value] = options.values()
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def elementwise(name: str) -> Callable[..., Array]:
    return lambda xp, options, *inputs: getattr(xp, name)(*inputs)


OPERATORS: dict[str, Callable[..., Array]] = {
    "Add": elementwise("add"),
    "And": elementwise("logical_and"),
    "BatchNormalization": batch_norm,
    "Cast": cast,
    "Clip": clip,
    "Concat": lambda xp, options, *inputs: xp.concatenate(inputs, options["axis"]),
    "Constant": constant,
    "ConstantOfShape": filled,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Div": lambda xp, options, a, b: a // b if a.dtype.kind == "i" else a / b,
    "Equal": elementwise("equal"),
    "Erf": lambda xp, options, x: lax.erf(x),
    "Expand": expand,
    "Flatten": lambda xp, options, x: x.reshape(int(np.prod(x.shape[: options.get("axis", 1)])), -1),
    "Gather": lambda xp, options, x, index: xp.take(x, index, options.get("axis", 0)),
    "Gemm": gemm,
    "GlobalAveragePool": lambda xp, options, x: x.mean((2, 3), keepdims=True),
    "GreaterOrEqual": elementwise("greater_equal"),
    "LayerNormalization": layer_norm,
    "MatMul": elementwise("matmul"),
    "MaxPool": max_pool,
    "Mul": elementwise("multiply"),
    "PRelu": lambda xp, options, x, slope: xp.where(x < 0, slope * x, x),
    "Pad": pad,
    "Range": lambda xp, options, *inputs: np.arange(*(each.item() for each in inputs)),
    "Relu": lambda xp, options, x: xp.maximum(x, 0),
    "Reshape": reshape,
    "Shape": lambda xp, options, x: np.array(x.shape[options.get("start", 0) : options.get("end")], np.int64),
    "Sigmoid": lambda xp, options, x: jax.nn.sigmoid(x),
    "Slice": cut,
    "Softmax": lambda xp, options, x: jax.nn.softmax(x, options.get("axis", -1)),
    "Transpose": lambda xp, options, x: x.transpose(options["perm"]),
    "Unsqueeze": unsqueeze,
    "Where": elementwise("where"),
}
