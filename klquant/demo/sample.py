"""Files to try the command line on: a float ONNX model, and pictures in one folder for each class."""

import logging
import warnings
from pathlib import Path

import torch
from PIL import Image

from klquant.demo.digits import Digits, load_images, load_network

NUM_PHOTOS, NUM_TEST = 256, 200


def write_sample(folder: Path) -> list[Path]:
    """Write ``model.onnx``, ``photos/`` to calibrate on and ``test/`` to measure on, and return their paths."""
    digits = load_images()
    folder.mkdir(parents=True, exist_ok=True)
    _export(digits, folder / "model.onnx")
    _write(digits.train_images[:NUM_PHOTOS], digits.train_labels, folder / "photos")
    _write(digits.test_images[:NUM_TEST], digits.test_labels, folder / "test")
    return [folder / name for name in ("model.onnx", "photos", "test")]


def _export(digits: Digits, path: Path) -> None:
    names = {"input_names": ["image"], "output_names": ["scores"]}
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it logs that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecations inside torch's exporter
        try:
            options = {"dynamic_shapes": ({0: torch.export.Dim("n")},), "external_data": False, "verbose": False}
            torch.onnx.export(load_network(), (digits.train_images[:2],), path, dynamo=True, **names, **options)  # type: ignore[arg-type]
        finally:
            logger.setLevel(level)


def _write(images: torch.Tensor, labels: torch.Tensor, folder: Path) -> None:
    for k, (image, label) in enumerate(zip(images, labels.tolist(), strict=False)):
        place = folder / str(label)
        place.mkdir(parents=True, exist_ok=True)
        pixels = (255 * image[0]).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(place / f"{k:03}.png")
