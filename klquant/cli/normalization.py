"""Signs that images are not normalized as the model expects."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from .images import ImageOptions

CONFIG = "preprocessor_config.json"  # of Hugging Face
MOVING = ("Identity", "Transpose", "Slice", "Concat", "Pad", "Cast")
LEAST, MOST = 1.0, 500.0
"""What the first convolution of a trained model can give at least and at most.

Of 11 models that take numbers up to 1 or 2.6 the bound is 2.2 to 170; of two that take 0 .. 255 it is 38 and 197.
"""


def suspicions(folder: Path, onnx_model: Any, options: ImageOptions) -> list[str]:
    """Return what suggests that other options for images are right; `folder` is that of the model."""
    return [text for text in (_of_config(folder / CONFIG, options), _of_weights(onnx_model, options)) if text]


def _of_config(path: Path, options: ImageOptions) -> str:
    """Compare the options with the file that Hugging Face keeps beside a model."""
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
        scale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
        normalizes = config.get("do_normalize", "image_mean" in config)
        mean, std = (
            [float(value) for value in config.get(f"image_{key}", [other])] for key, other in (("mean", 0), ("std", 1))
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return ""
    pixel_range = 1 if scale < 0.5 else 255
    wanted = {"mean": mean, "std": std} if normalizes else {"mean": [0.0], "std": [1.0]}
    is_same = all(np.allclose(np.broadcast_to(getattr(options, key), 3), wanted[key], atol=1e-3) for key in wanted)
    if is_same and pixel_range == options.pixel_range:
        return ""
    flags = [f"--{key} {','.join(f'{value:g}' for value in values)}" for key, values in wanted.items()]
    flags += [f"--pixel-range {pixel_range}"] * (pixel_range != options.pixel_range)
    return f"`{path.name}` beside the model asks for another normalization: {' '.join(flags)}"


def _of_weights(onnx_model: Any, options: ImageOptions) -> str:
    """Compare the range of the input with the weights of the first convolution, if it reads the input directly."""
    weights = _first_weights(onnx_model.graph)
    if weights is None:
        return ""
    largest = max(map(abs, options.limits))
    bound = largest * float(np.abs(weights.reshape(len(weights), -1)).sum(1).max())
    found = f"the first layer gives at most {bound:.3g} for inputs up to {largest:.3g}"
    if bound < LEAST and options.pixel_range == 1:
        return f"{found}: the model may expect pixels from 0 to 255, that is --pixel-range 255"
    if bound > MOST and options.pixel_range == 255:
        return f"{found}: the model may expect pixels from 0 to 1, that is --pixel-range 1"
    return ""


def _first_weights(graph: Any) -> Any:
    """Return the weights of the convolution that reads the first input, perhaps through moves of its values."""
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in graph.initializer}
    reached = {graph.input[0].name} if graph.input else set()
    for node in graph.node:
        if node.op_type == "Conv" and node.input[0] in reached and node.input[1] in constants:
            return numpy_helper.to_array(constants[node.input[1]])
        if node.op_type in MOVING and reached & set(node.input):
            reached |= set(node.output)
    return None
