"""The bars of accuracy on trained networks; ``python tests/tools/bench/accuracy.py`` prints the whole table."""

import pytest
import torch
from torch import nn

from klquant.demo.digits import load_images, load_network
from support.digits_networks import DATA, NETWORKS, TRAINED, load, scaled_vgg
from tools.bench.accuracy import convert, logits, score

MAY_LOSE = 0.4  # points of top-1 against FP32


@pytest.fixture(scope="module")
def digits():
    return load_images()


def losses(name, recipe, digits):
    network = load(name)
    int8 = score(convert(network, digits, recipe), network, digits)
    return score(network, network, digits).top1 - int8.top1, int8.sqnr_db


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_trained(name, digits):
    network = load(name)
    assert score(network, network, digits).top1 >= 99


@pytest.mark.parametrize("name", ["VGG", "residual net", "MobileNetV2"])
def test_int8_is_as_good_as_float_by_default(name, digits):
    lost, sqnr_db = losses(name, "INT8 entropy (default)", digits)
    assert lost <= MAY_LOSE
    assert 30 < sqnr_db < 50  # more would not be INT8


def test_scaled_channels_need_equalization(digits):
    lost, sqnr_db = losses("scaled VGG", "INT8 entropy (default)", digits)
    assert lost > 5
    assert sqnr_db < 10
    lost, sqnr_db = losses("scaled VGG", "INT8 entropy + equalize", digits)
    assert lost <= MAY_LOSE
    assert sqnr_db > 30


def test_bias_correction_brings_the_logits_closer(digits):
    _, before = losses("residual net", "INT8 entropy (default)", digits)
    lost, after = losses("residual net", "INT8 entropy + bias correction", digits)
    assert after > before + 1
    assert lost <= MAY_LOSE


def test_scaling_channels_preserves_the_function(digits):
    expected, got = (logits(network, digits.test_images) for network in (load_network(), scaled_vgg()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_scaling_reaches_every_hidden_channel():
    scaled, network = scaled_vgg(), load_network()
    spreads = [
        (a.weight / b.weight).log().std()
        for a, b in zip(scaled.modules(), network.modules(), strict=True)
        if isinstance(a, nn.BatchNorm2d)
    ]
    assert len(spreads) == 4
    assert all(1 < spread < 2 for spread in spreads)


@pytest.mark.parametrize("file", [file for _, file in TRAINED.values()])
def test_weights_are_small(file):
    assert (DATA / f"{file}.safetensors").stat().st_size <= 300 * 1024
