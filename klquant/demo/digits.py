"""Data and network of the demo: scikit-learn's handwritten digits and a VGG-style classifier."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from klquant.errors import InvalidInputError

WEIGHTS = Path(__file__).with_name("digits_vgg.safetensors")  # made by training.py
NUM_TEST = 600


class Digits(NamedTuple):
    """1,797 images of 8 x 8 pixels in a fixed split, as float32 of shape (n, 1, 8, 8) from 0 to 1."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_images() -> Digits:
    """Return the digits: 1,197 to train and 600 to test, stratified by class."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=NUM_TEST, stratify=labels, random_state=0)
    train_x, test_x = (torch.tensor(x / 16, dtype=torch.float32).reshape(-1, 1, 8, 8) for x in parts[:2])
    train_y, test_y = (torch.tensor(y, dtype=torch.int64) for y in parts[2:])
    return Digits(train_x, train_y, test_x, test_y)


def digits_vgg() -> nn.Module:
    """Return the untrained network: twice two Conv-BN-ReLU and a MaxPool, then Linear-ReLU-Linear."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    features = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32), *block(32, 64), nn.MaxPool2d(2)]
    classifier = [nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)]
    network = nn.Sequential()
    network.add_module("features", nn.Sequential(*features))
    network.add_module("classifier", nn.Sequential(*classifier))
    return network


def load_network(weights: Path = WEIGHTS) -> nn.Module:
    """Return the trained network in eval mode."""
    network = digits_vgg()
    try:
        network.load_state_dict(load_file(weights))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InvalidInputError(f"`{weights}` must hold the weights of the demo network: {error}") from error
    return network.eval()
