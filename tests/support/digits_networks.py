"""Trained networks on scikit-learn's digits: a VGG, one with its channels scaled, a residual net, a MobileNetV2.

``python tests/support/digits_networks.py`` trains all of them again and writes tests/support/data, in a minute or two
each; ``python tests/support/digits_networks.py "residual net"`` only that one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script

from itertools import pairwise

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from klquant.demo.digits import load_images, load_network
from klquant.demo.training import save_weights, train

DATA = Path(__file__).parent / "data"
SIGMA = 1.5  # standard deviation of the logarithms of the channel factors


class ResidualBlock(nn.Module):
    """Conv-BN-ReLU-Conv-BN, added to its input (or a downsampled one); one ReLU module serves both places."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; ReLU6 after all but the last, added to its input where the shapes agree."""

    def __init__(self, inputs, outputs, stride=1, expansion=4):
        super().__init__()
        hidden = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *_conv_norm_relu6(inputs, hidden, 1),
            *_conv_norm_relu6(hidden, hidden, 3, stride=stride, padding=1, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x):
        return x + self.conv(x) if self.adds else self.conv(x)


def _conv_norm_relu6(inputs, outputs, size, **options):
    return nn.Conv2d(inputs, outputs, size, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True)


def residual_net():
    stem = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
    blocks = ResidualBlock(16, 16), ResidualBlock(16, 32, stride=2), ResidualBlock(32, 48, stride=2)
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def mobilenet():
    stem = _conv_norm_relu6(1, 16, 3, padding=1)
    shapes = (16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 1), (32, 32, 1)
    blocks = (InvertedResidual(*shape) for shape in shapes)
    head = *_conv_norm_relu6(32, 128, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 10)
    return nn.Sequential(*stem, *blocks, *head)


TRAINED = {"residual net": (residual_net, "digits_resnet"), "MobileNetV2": (mobilenet, "digits_mobilenet")}
NETWORKS = ("VGG", *TRAINED, "scaled VGG")


def load(name):
    """Return a trained network in eval mode."""
    if name not in TRAINED:
        return load_network() if name == "VGG" else scaled_vgg()
    make, file = TRAINED[name]
    network = make()
    network.load_state_dict(load_file(DATA / f"{file}.safetensors"))
    return network.eval()


def scaled_vgg(seed=0):
    """Return the VGG with each hidden channel scaled by a random factor that the next layer undoes."""
    network, generator = load_network(), torch.Generator().manual_seed(seed)
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))]
    weighted = [m for m in layers if not isinstance(m, nn.BatchNorm2d)]
    for first, second in pairwise(weighted):
        scaled = layers[layers.index(first) + 1] if isinstance(first, nn.Conv2d) else first  # the BatchNorm if any
        factors = (SIGMA * torch.randn(len(first.weight), generator=generator)).exp()
        inputs = second.weight.shape[1] // len(factors)  # more than one if a Flatten lies between
        with torch.no_grad():
            scaled.weight.mul_(factors.reshape(-1, *[1] * (scaled.weight.ndim - 1)))
            scaled.bias.mul_(factors)
            second.weight.div_(factors.repeat_interleave(inputs).reshape(1, -1, *[1] * (second.weight.ndim - 2)))
    return network


def main(names):
    """Train the networks and write their weights."""
    digits = load_images()
    for name in names or TRAINED:
        make, file = TRAINED[name]
        network = train(digits, make=make, max_lr=6e-3)
        save_weights(network, DATA / f"{file}.safetensors")
        with torch.no_grad():
            right = (network(digits.test_images).argmax(1) == digits.test_labels).double().mean()
        Console().print(f"{name}: {100 * right:.2f} % of the test images")


if __name__ == "__main__":
    main(sys.argv[1:])
