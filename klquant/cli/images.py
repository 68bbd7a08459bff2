"""Images as input of a network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import click
import numpy as np

from klquant.errors import InvalidInputError, MissingDependencyError

from .options import parse_numbers, parse_size

Array: TypeAlias = "np.ndarray[Any, Any]"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # whatever the file name is: EPS would run Ghostscript
GREY = 114  # of the bars of a letterbox, as YOLO pads


class ImageOptions(NamedTuple):
    """How to turn an image into an array: ``(pixels - mean) / std``, with pixels from 0 to `pixel_range`."""

    size: tuple[int, int] | None = None
    """Height and width; None as in the model."""
    fit: Literal["stretch", "crop", "letterbox"] = "stretch"
    """How images of another shape get this size."""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    pixel_range: int = 1
    channels: Literal["RGB", "BGR", "L"] | None = None
    """L is grey; None as in the model."""
    layout: Literal["NCHW", "NHWC"] | None = None
    """None as in the model."""

    def of_model(self, graph: Any) -> "ImageOptions":
        """Return these options with what is missing taken from the first input of an onnx.GraphProto."""
        dims = graph.input[0].type.tensor_type.shape.dim if graph.input else []
        sizes = [max(size.dim_value, 0) for size in dims]
        if len(sizes) != 4:
            return self
        is_last = sizes[1] not in (1, 3) and sizes[3] in (1, 3)
        layout = self.layout or ("NHWC" if is_last else "NCHW")
        count, height, width = (sizes[3], *sizes[1:3]) if layout == "NHWC" else sizes[1:]
        size = self.size or ((height, width) if height and width else None)
        return self._replace(size=size, layout=layout, channels=self.channels or ("L" if count == 1 else "RGB"))

    def check(self) -> None:
        """Raise InvalidInputError for a mean or standard deviation of pixels from 0 to 255, if they are from 0 to 1."""
        for name, most in (("mean", 1), ("std", 2)):
            numbers = getattr(self, name)
            if self.pixel_range == 1 and max(map(abs, numbers)) > most:
                got = ",".join(f"{number:g}" for number in numbers)
                raise InvalidInputError(
                    f"`--{name}` must be for pixels from 0 to 1, got {got}; add --pixel-range 255 for pixels up to 255"
                )

    @property
    def limits(self) -> tuple[float, float]:
        """Return the smallest and the largest number that an image can become."""
        ends = np.array([[0.0], [self.pixel_range]])
        values = (ends - np.array(self.mean)) / np.array(self.std)
        return float(values.min()), float(values.max())

    def __str__(self) -> str:
        """Return the options as ``rgb / 255, no mean / std, 224x224: inputs 0 .. 1``."""
        pixels = {"L": "grey"}.get(self.channels or "RGB", (self.channels or "RGB").lower())
        pixels += " / 255" if self.pixel_range == 1 else ""
        numbers = [",".join(f"{number:g}" for number in values) for values in (self.mean, self.std)]
        plain = set(self.mean) == {0.0} and set(self.std) == {1.0}
        height, width = self.size or (0, 0)
        low, high = self.limits
        change = "no mean / std" if plain else f"mean {numbers[0]}, std {numbers[1]}"
        how = {"stretch": "stretched", "crop": "cropped", "letterbox": "letterboxed"}[self.fit]
        return f"{pixels}, {change}, {how} to {height}x{width}: inputs {low:.3g} .. {high:.3g}"


def load_image(path: Path, options: ImageOptions) -> Array:
    """Return an image as float32, without a batch axis."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingDependencyError("images need Pillow: pip install 'klquant[images]'") from error
    mode = "L" if options.channels == "L" else "RGB"
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            fitted = _fitted(image.convert(mode), options)
            raw = np.asarray(fitted, np.float32).reshape(*reversed(fitted.size), -1)
    except Exception as error:  # Pillow raises many types
        raise InvalidInputError(f"`{path}` must be an image, got a damaged file: {error}") from error
    ordered = raw[..., ::-1] if options.channels == "BGR" else raw
    scaled = ordered / 255 if options.pixel_range == 1 else ordered
    pixels: Array = (scaled - np.asarray(options.mean, np.float32)) / np.asarray(options.std, np.float32)
    return np.ascontiguousarray(pixels if options.layout == "NHWC" else pixels.transpose(2, 0, 1))


def _fitted(image: Any, options: ImageOptions) -> Any:
    """Return an image in the wanted size."""
    from PIL import Image, ImageOps

    height, width = options.size or (0, 0)
    if options.fit == "crop":  # the shorter side fits, the middle of the longer one is kept
        return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    if options.fit == "letterbox":
        grey = GREY if options.channels == "L" else (GREY,) * 3
        return ImageOps.pad(image, (width, height), Image.Resampling.BILINEAR, color=grey)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def image_options(command: Any) -> Any:
    """Add the options whose values are the fields of an ImageOptions."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def options_as_given() -> list[str]:
    """Return the words of the options for images on this command line, for another command on the same data."""
    arguments: list[str] = click.get_current_context().meta["klquant.arguments"]
    words: list[str] = []
    for k, word in enumerate(arguments):
        if word.partition("=")[0] in _NAMES:
            words += arguments[k : k + 1 if "=" in word else k + 2]
    return words


_NAMES = ("--image-size", "--fit", "--mean", "--std", "--pixel-range", "--channels", "--layout")
_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--image-size", "size", metavar="HxW", callback=parse_size,
                 help="Size of images.  [default: as in the model]"),
    click.option("--fit", type=click.Choice(["stretch", "crop", "letterbox"]), default="stretch", show_default=True,
                 help="How to fit images to this size: distort, cut or pad them."),
    click.option("--mean", default="0", show_default=True, metavar="A[,B,C]", callback=parse_numbers,
                 help="Mean of the pixel values: one number, or three in the order of the channels."),
    click.option("--std", default="1", show_default=True, metavar="A[,B,C]", callback=parse_numbers,
                 help="Standard deviation of the pixel values: one number, or three."),
    click.option("--pixel-range", type=click.Choice([1, 255]), default=1, show_default=True,
                 help="Largest pixel value before mean and std are applied."),
    click.option("--channels", type=click.Choice(["RGB", "BGR", "L"]),
                 help="Order of the channels; L is grey.  [default: RGB, or as in the model]"),
    click.option("--layout", type=click.Choice(["NCHW", "NHWC"]),
                 help="Axis order of images.  [default: as in the model]"),
)  # fmt: skip
