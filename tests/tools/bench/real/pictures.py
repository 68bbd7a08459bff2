"""Photos out of packages, and text drawn on them: inputs that networks for pictures were trained for."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PEOPLE = {"calibration": ("astronaut.png", "bus.jpg"), "test": ("zidane.jpg", "grace_hopper.jpg")}
PORTRAITS = {
    "calibration": ("zidane.jpg", "grace_hopper.jpg", "obama.jpg", "obama2.jpg", "obama3.jpg"),
    "test": ("astronaut.png", "bus.jpg", "biden.jpg", "t1.jpg"),
}
"""People of whom more is to be seen; nobody is in both parts."""
THINGS = {
    "calibration": ("coffee.png", "china.jpg", "motorcycle_left.png", "rocket.jpg", "ihc.png", "brick.png"),
    "test": ("chelsea.png", "flower.jpg", "hubble_deep_field.jpg", "retina.jpg", "color.png", "gravel.png"),
}
FONTS = {
    "calibration": ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono-Bold.ttf", "STIXGeneral.ttf"),
    "test": ("DejaVuSans-Bold.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSansMono.ttf", "STIXGeneralBol.ttf"),
}


def find(folder: Path, name: str) -> Path:
    """The file of that name in the unpacked packages."""
    return next(iter(sorted(folder.rglob(name))))


def photos(folder: Path, names: tuple[str, ...]) -> list[Image.Image]:
    return [Image.open(find(folder, name)).convert("RGB") for name in names]


def crops(images: list[Image.Image], count: int, size: tuple[int, int], seed: int) -> Iterator[Image.Image]:
    """Cut random parts out of the pictures in turn, half of them mirrored, and scale them to (width, height)."""
    rng, aspect = np.random.default_rng(seed), size[0] / size[1]
    for i in range(count):
        image = images[i % len(images)]
        width = min(image.width, image.height * aspect) * rng.uniform(0.6, 1)
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - width / aspect)
        cut = image.resize(size, Image.Resampling.BILINEAR, (left, top, left + width, top + width / aspect))
        yield cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if i // len(images) % 2 else cut


def drawn(folder: Path, image: Image.Image, words: list[str], part: str, rng: np.random.Generator) -> Image.Image:
    """Draw lines of words over a picture, some on a plain ground, in several fonts, sizes and colours."""
    image = image.copy()
    draw = ImageDraw.Draw(image)
    y, taken = rng.integers(4, 30), 0
    while y < image.height - 20 and taken < len(words):
        font = font_of(folder, part, int(rng.integers(14, 40)), rng)
        line = " ".join(words[taken : taken + rng.integers(1, 4)])
        taken, x = taken + len(line.split()), rng.integers(4, image.width // 2)
        dark = rng.random() < 0.5
        if rng.random() < 0.6:
            draw.rectangle(
                draw.textbbox((x, y), line, font), tuple(rng.integers(*((200, 256) if dark else (0, 60)), 3))
            )
        draw.text((x, y), line, tuple(rng.integers(*((0, 80) if dark else (180, 256)), 3)), font)
        y += font.size * rng.uniform(1.3, 3)
    return image


def font_of(folder: Path, part: str, size: int, rng: np.random.Generator) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(find(folder, str(rng.choice(FONTS[part]))), size)


def line(folder: Path, ground: Image.Image, text: str, part: str, rng: np.random.Generator) -> Image.Image:
    """One line of text as a detector cuts it out: 48 pixels high, as wide as the text, on paper or on a photo."""
    font = font_of(folder, part, int(rng.integers(24, 36)), rng)
    left, top, right, bottom = font.getbbox(text)
    size = (int(right - left + rng.integers(6, 20)), 48)
    dark = rng.random() < 0.5
    paper = Image.new("RGB", size, tuple(rng.integers(*((170, 256) if dark else (0, 80)), 3)))
    image = Image.blend(paper, ground.resize(size), rng.uniform(0, 0.35))
    at = (4 - left, 24 - (top + bottom) / 2 + rng.integers(-2, 3))
    ImageDraw.Draw(image).text(at, text, tuple(rng.integers(*((0, 90) if dark else (190, 256)), 3)), font)
    noise = rng.normal(0, rng.uniform(0, 8), (48, size[0], 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype("u1"))


def channels_first(image: Image.Image, mean: object = 0.0, std: object = 1.0, *, bgr: bool = False) -> np.ndarray:
    """Scale values to 0 .. 1, subtract the mean, divide by the deviation, and put the channels first."""
    values = np.asarray(image, "f")[..., :: -1 if bgr else 1] / 255
    return ((values - np.asarray(mean)) / np.asarray(std)).transpose(2, 0, 1).astype("f")
