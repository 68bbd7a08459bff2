"""Calibrate on a number of images of 64 x 64 pixels, and print the peak memory in KiB: see torch/test_memory.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script


import torch
from torch import nn

from klquant.backends.torch import quantize
from support import resident


class Images:
    """Batches of 32 images, each made when it is read; the last one may be smaller."""

    def __init__(self, number):
        self.number = number

    def __iter__(self):
        for begin in range(0, self.number, 32):
            generator = torch.Generator().manual_seed(begin)
            yield torch.randn(min(32, self.number - begin), 1, 64, 64, generator=generator)


def network():
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 30 * 30, 10)).eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    number, passes, keep_bytes = map(int, sys.argv[1:])
    quantize(network(), Images(number), criterion="max", passes=passes, keep_bytes=keep_bytes)
    print(resident.peak())  # noqa: T201
