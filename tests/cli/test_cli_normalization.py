"""Signs that pictures are not normalized as the model expects: a config of Hugging Face, and the first weights."""

import json
import re

import numpy as np
import pytest

from klquant.cli.images import ImageOptions
from klquant.cli.normalization import suspicions
from support.onnx_models import build

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_normalize": True}
FLAGS = "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
RIGHT = ImageOptions(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def network(size, before=""):
    weights = np.full((4, 3, 3, 3), size / 27, np.float32)
    body = f"{before} a = Conv ({'t' if before else 'x'}, w) y = Relu (a)"
    return build("float[n, 3, 8, 8] x", "float[n, 4, 6, 6] y", body, w=weights)


@pytest.mark.parametrize(
    ("config", "options", "text"),
    [
        (IMAGENET, ImageOptions(), f"asks for another normalization: {FLAGS}"),
        (IMAGENET, RIGHT, ""),
        (IMAGENET, RIGHT._replace(pixel_range=255), f"{FLAGS} --pixel-range 1"),
        ({"do_normalize": False}, ImageOptions(), ""),
        ({"do_normalize": False}, RIGHT, "--mean 0 --std 1"),
        ({"image_mean": 0.5, "image_std": 0.5}, ImageOptions(mean=(0.5,), std=(0.5,)), ""),
        ({**IMAGENET, "do_rescale": False, "image_mean": [123.7] * 3}, RIGHT, "--pixel-range 255"),
        ([], ImageOptions(), ""),
        ({"image_mean": "none", "do_normalize": True}, ImageOptions(), ""),
    ],
)
def test_the_config_beside_the_model(tmp_path, config, options, text):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    found = " ".join(suspicions(tmp_path, network(5.0), options))
    assert text in found
    assert bool(found) == bool(text)


@pytest.mark.parametrize(
    ("size", "pixel_range", "text"),
    [
        (0.15, 1, "the first layer gives at most 0.15 for inputs up to 1: .* --pixel-range 255"),
        (0.15, 255, ""),
        (5.0, 1, ""),
        (5.0, 255, "gives at most 1.2.e\\+03 for inputs up to 255: .* --pixel-range 1"),
    ],
)
@pytest.mark.parametrize("before", ["", "t = Identity (x)"])
def test_the_weights_of_the_first_convolution(tmp_path, size, pixel_range, text, before):
    found = suspicions(tmp_path, network(size, before), ImageOptions(pixel_range=pixel_range))
    assert len(found) == bool(text)
    if text:
        assert re.search(text, found[0])


def test_models_that_change_their_input_are_not_judged(tmp_path):
    assert suspicions(tmp_path, network(0.1, "t = Neg (x)"), ImageOptions()) == []
