"""Pictures as a network's input."""

from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import click
import numpy as np

from klquant.errors import InvalidInputError, MissingDependencyError

from .options import parse_numbers, parse_size

Array: TypeAlias = "np.ndarray[Any, Any]"
SUFFIXES = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")  # whatever the name says: others are more to trust, and EPS runs Ghostscript


class ImageOptions(NamedTuple):
    """How a picture becomes an array: ``(rgb / 255 - mean) / std``."""

    size: tuple[int, int] | None = None
    """Height and width; pictures of another size are resized (bilinear), whatever their shape."""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["NCHW", "NHWC"] = "NCHW"


def load_image(path: Path, options: ImageOptions) -> Array:
    """Return one picture without the batch axis, float32."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingDependencyError("pictures need Pillow: pip install 'klquant[images]'") from error
    height, width = options.size or (0, 0)
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            rgb = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR), np.float32)
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        raise InvalidInputError(f"`{path}` must be a picture, got a damaged file: {error}") from error
    pixels: Array = (rgb / 255 - np.asarray(options.mean, np.float32)) / np.asarray(options.std, np.float32)
    return pixels if options.layout == "NHWC" else pixels.transpose(2, 0, 1)


def image_options(command: Any) -> Any:
    """Add the options that make an ImageOptions; they arrive under the names of its fields."""
    size = click.option(
        "--image-size", "size", metavar="HxW", callback=parse_size, help="Resize pictures to this; needed."
    )
    mean = click.option("--mean", default="0", show_default=True, metavar="A[,B,C]", callback=parse_numbers,
                        help="Of pixels between 0 and 1, one or for R,G,B.")  # fmt: skip
    std = click.option("--std", default="1", show_default=True, metavar="A[,B,C]", callback=parse_numbers,
                       help="Of pixels between 0 and 1, one or for R,G,B.")  # fmt: skip
    layout = click.option("--layout", type=click.Choice(["NCHW", "NHWC"]), default="NCHW", show_default=True,
                          help="Where the channels of pictures stand.")  # fmt: skip
    return size(mean(std(layout(command))))
