"""Images as input of a network."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import click
import numpy as np

from klquant.errors import InvalidInputError, MissingDependencyError

from .options import parse_numbers, parse_size

Array: TypeAlias = "np.ndarray[Any, Any]"
SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")  # whatever the file name is: other decoders are riskier, and EPS runs Ghostscript


class ImageOptions(NamedTuple):
    """How to turn an image into an array: ``(rgb / 255 - mean) / std``."""

    size: tuple[int, int] | None = None
    """Height and width. Other images are resized (bilinear), without keeping their aspect ratio."""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"


def load_image(path: Path, options: ImageOptions) -> Array:
    """Return an image as float32, without a batch axis."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingDependencyError("images need Pillow: pip install 'klquant[images]'") from error
    height, width = options.size or (0, 0)
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            rgb = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR), np.float32)
    except Exception as error:  # Pillow raises many types
        raise InvalidInputError(f"`{path}` must be an image, got a damaged file: {error}") from error
    pixels: Array = (rgb / 255 - np.asarray(options.mean, np.float32)) / np.asarray(options.std, np.float32)
    return pixels if options.layout == "NHWC" else pixels.transpose(2, 0, 1)


def image_options(command: Any) -> Any:
    """Add the options whose values are the fields of an ImageOptions."""
    size = click.option(
        "--image-size",
        "size",
        metavar="HxW",
        callback=parse_size,
        help="Resize images to this size; required for images.",
    )
    mean = click.option("--mean", default="0", show_default=True, metavar="A[,B,C]", callback=parse_numbers,
                        help="Mean of pixel values from 0 to 1; one, or three for R,G,B.")  # fmt: skip
    std = click.option("--std", default="1", show_default=True, metavar="A[,B,C]", callback=parse_numbers,
                       help="Their standard deviation; one, or three for R,G,B.")  # fmt: skip
    layout = click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), default="NCHW", show_default=True,
                          help="Axis order of images.")  # fmt: skip
    return size(mean(std(layout(command))))
