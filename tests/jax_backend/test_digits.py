"""The trained digits VGG, ported to JAX: the thresholds of the PyTorch backend, its accuracy, and INT8 kernels."""

import warnings

import jax
import numpy as np
import pytest

from klquant.backends.jax import quantize, requantize
from support.jax_networks import compiled_s8_products, digits, s8_products, sqnr_db, vgg, vgg_params
from support.namespaces import import_torch

BATCH = 128


@pytest.fixture(scope="module")
def quantized():
    train = digits()[0]
    batches = [train[k : k + BATCH] for k in range(0, len(train), BATCH)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return quantize(vgg, vgg_params(), batches)


def test_thresholds_are_those_of_the_pytorch_backend(quantized):
    import_torch()
    from klquant.backends import torch as torch_backend
    from klquant.demo.digits import load_images, load_network

    batches = list(load_images().train_images[:512].split(BATCH))
    theirs = torch_backend.quantize(load_network(), batches).thresholds
    assert list(quantized.thresholds) == ["conv0", "conv3", "conv7", "conv10", "fc1", "fc2"]
    for ours, other in zip(quantized.thresholds.values(), theirs.values(), strict=True):
        assert ours.amax == pytest.approx(other.amax, rel=1e-5)
        assert ours.threshold == pytest.approx(other.threshold, rel=1e-3)  # a bin
        assert ours.criterion == other.criterion


def test_int8_is_as_accurate_as_its_simulation(quantized):
    _, images, labels = digits()
    simulated = requantize(vgg, vgg_params(), images[:1], quantized.calibration, form="simulate")
    exact, int8, close = (jax.jit(f)(vgg_params(), images) for f in (vgg, quantized.function, simulated.function))
    correct = [int((np.asarray(logits).argmax(1) == labels).sum()) for logits in (exact, int8)]
    assert correct[0] == 598
    assert abs(correct[1] - 597) <= 1
    assert sqnr_db(exact, int8) == pytest.approx(36.5, abs=1)
    assert sqnr_db(close, int8) > 50  # a few roundings near a tie


def test_the_compiled_program_multiplies_integers(quantized):
    images = digits()[1][:64]
    assert s8_products(quantized.function, vgg_params(), images) == {"convolution": 4, "dot_general": 2}
    if jax.default_backend() == "cpu":  # from some size on XLA has kernels for INT8 on CPUs
        assert compiled_s8_products(quantized.function, vgg_params(), images)["dot"] == 2
