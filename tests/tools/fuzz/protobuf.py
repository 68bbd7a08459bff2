"""Damage to ONNX models that keeps them valid protobuf: fields are set, dropped, doubled and swapped."""

import onnx
from google.protobuf.message import DecodeError

from .mutation import INTEGERS, mutate

TEXTS = [
    "",
    "x",
    "y",
    "w",
    "c",
    "Relu",
    "Conv",
    "Add",
    "MatMul",
    "Constant",
    "If",
    "Reshape",
    "Range",
    "f",
    "mine",
    "ai.onnx",
]
TEXTS += [
    "QuantizeLinear",
    "DequantizeLinear",
    "Loop",
    "Gemm",
    "Cast",
    "BatchNormalization",
    "\x1b[31m",
    "../x",
    "Clip",
]


def mutate_model(data, random, others=()):
    """Return the bytes of a model with damage to some of its fields, and sometimes to the bytes themselves."""
    model = onnx.ModelProto()
    try:
        if random.random() < 0.15:
            return mutate(data, random, others)
        model.ParseFromString(data)
        for _ in range(random.choice((1, 1, 1, 1, 2, 4))):
            _damage(random.choice(_messages(model)), random)
        return model.SerializeToString()
    except (DecodeError, ValueError, TypeError, UnicodeError):  # damaged before, or a number that does not fit
        return data


def _messages(model):
    """Return the non-empty messages of a model."""
    found = [model]
    for message in found:
        for field, value in message.ListFields():
            if field.message_type is not None:
                found += list(value) if _is_repeated(value) else [value]
    return [message for message in found if message.ListFields()]


def _damage(message, random):
    field, value = random.choice(message.ListFields())
    if not _is_repeated(value):
        if random.random() < 0.2:
            message.ClearField(field.name)
        elif field.message_type is None:
            setattr(message, field.name, _other(value, random))
    elif random.random() < 0.25:
        del value[random.randrange(len(value))]
    elif field.message_type is None:
        value[random.randrange(len(value))] = _other(value[0], random)
    elif random.random() < 0.5:
        value.add().CopyFrom(random.choice(value))
    else:
        random.choice(value).CopyFrom(random.choice(value))


def _is_repeated(value):
    return hasattr(value, "__len__") and not isinstance(value, str | bytes)


def _other(value, random):
    if isinstance(value, bytes):
        return random.choice((b"", value[:-1], value * 2, random.randbytes(len(value)), *map(str.encode, TEXTS)))
    if isinstance(value, str):
        return random.choice(TEXTS)
    if isinstance(value, float):
        return random.choice((0.0, -1.0, 1e30, float("nan"), float("inf"), 1e-40))
    return random.choice((value + 1, -value, -1, 1, 2, 3, 7, 10, 13, 16, *INTEGERS))
