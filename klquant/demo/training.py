"""Training of the demo network, about a minute on two cores.

``klquant demo --retrain`` runs it. ``python -m klquant.demo.training FILE`` writes the weights that klquant ships.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from torch import nn

from klquant.backends.files import write_atomic
from klquant.demo.digits import Digits, digits_vgg, load_images

EPOCHS = 60
BATCH_SIZE = 64


def train(
    digits: Digits,
    *,
    make: Callable[[], nn.Module] = digits_vgg,
    epochs: int = EPOCHS,
    max_lr: float = 3e-3,
    seed: int = 0,
) -> nn.Module:
    """Return the trained network in eval mode. The global random state is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = make()
        steps = -(-len(digits.train_labels) // BATCH_SIZE) * epochs
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=max_lr, total_steps=steps)
        for _ in track(range(epochs), "training", console=Console(stderr=True)):
            for chosen in torch.randperm(len(digits.train_labels)).split(BATCH_SIZE):
                logits = network(_shifted(digits.train_images[chosen]))
                loss = nn.functional.cross_entropy(logits, digits.train_labels[chosen], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def save_weights(network: nn.Module, path: Path) -> None:
    """Write the network's weights as safetensors."""
    write_atomic(path, save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}))


def _shifted(images: torch.Tensor) -> torch.Tensor:
    """Return the images, each shifted by up to one pixel at random."""
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    offsets = torch.randint(0, 3, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, offsets, strict=True)])


if __name__ == "__main__":
    save_weights(train(load_images()), Path(sys.argv[1]))
