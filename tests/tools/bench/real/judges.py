"""How well the answers of an INT8 network agree with those of FP32, as its user sees them."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray
Outputs = list[Array]
Judge = Callable[[Outputs, Outputs, dict[str, Array]], "Score"]


class Score(NamedTuple):
    agreement: float
    """With FP32 in the network's task: 1 is all."""
    sqnr_db: float
    """Signal-to-quantization-noise ratio of the output, in dB."""


class Boxes(NamedTuple):
    corners: Array
    """(n, 4): left, top, right, bottom."""
    classes: Array


def sqnr(expected: Array, got: Array) -> float:
    noise = np.square(expected.astype("f8") - got).sum()
    return float(10 * np.log10(np.square(expected.astype("f8")).sum() / max(noise, 1e-30)))


def top1(expected: Outputs, got: Outputs, inputs: dict[str, Array]) -> Score:
    """Share of inputs with the same class, by the last output."""
    same = expected[-1].argmax(-1) == got[-1].argmax(-1)
    return Score(float(same.mean()), sqnr(expected[-1], got[-1]))


def decisions(expected: Outputs, got: Outputs, inputs: dict[str, Array]) -> Score:
    return Score(float(((expected[0] > 0.5) == (got[0] > 0.5)).mean()), sqnr(expected[0], got[0]))


def regions(expected: Outputs, got: Outputs, inputs: dict[str, Array]) -> Score:
    """Intersection over union of the pixels that belong to text."""
    a, b = expected[0] > 0.3, got[0] > 0.3
    return Score(float((a & b).sum() / (a | b).sum()), sqnr(expected[0], got[0]))


def strings(expected: Outputs, got: Outputs, inputs: dict[str, Array]) -> Score:
    """Share of lines that are read as the same string."""
    same = [a == b for a, b in zip(map(read, expected[0]), map(read, got[0]), strict=True)]
    return Score(float(np.mean(same)), sqnr(expected[0], got[0]))


def read(steps: Array) -> list[int]:
    """The characters of CTC's best path."""
    best = steps.argmax(-1)
    return [int(now) for now, before in zip(best, [-1, *best[:-1]], strict=True) if now not in (0, before)]


def embeddings(expected: Outputs, got: Outputs, inputs: dict[str, Array]) -> Score:
    """Mean cosine of the sentences' vectors, which are means over their tokens."""
    mask = inputs["attention_mask"][..., None]
    a, b = (expected[0] * mask).sum(1), (got[0] * mask).sum(1)
    cosines = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    return Score(float(cosines.mean()), sqnr(expected[0] * mask, got[0] * mask))


def boxes(decode: Callable[[Outputs], list[Boxes]], scores: slice = slice(None)) -> Judge:
    """F1 of boxes: those of FP32 are the truth, a box of the same class with IoU of 0.5 or more is a hit.

    The SQNR is that of the `scores`, given by their place on the second axis of the first output.
    """

    def judge(expected: Outputs, got: Outputs, inputs: dict[str, Array]) -> Score:
        return Score(f1(decode(got), decode(expected)), sqnr(expected[0][:, scores], got[0][:, scores]))

    return judge


def yolov8(outputs: Outputs) -> list[Boxes]:
    return [suppressed(corners(one[:4].T), one[4:].max(0), one[4:].argmax(0), 0.25, 0.45) for one in outputs[0]]


def yolox(outputs: Outputs, size: int = 416) -> list[Boxes]:
    cells, strides = [], []
    for stride in (8, 16, 32):
        y, x = np.mgrid[: size // stride, : size // stride]
        cells.append(np.stack([x, y], -1).reshape(-1, 2))
        strides.append(np.full((len(cells[-1]), 1), stride))
    cell, stride = np.concatenate(cells), np.concatenate(strides)
    found = []
    for one in outputs[0]:
        box = corners(np.concatenate([(one[:, :2] + cell) * stride, np.exp(one[:, 2:4]) * stride], 1))
        found.append(suppressed(box, one[:, 4] * one[:, 5], np.zeros(len(one), int), 0.1, 0.45))
    return found


def centerface(outputs: Outputs) -> list[Boxes]:
    found = []
    for heat, size, offset in zip(*outputs[:3], strict=True):
        y, x = np.nonzero(heat[0] > 0.35)
        extent = np.exp(size[::-1, y, x]) * 4
        centre = (np.stack([x, y]) + offset[::-1, y, x] + 0.5) * 4
        box = corners(np.concatenate([centre, extent]).T)
        found.append(suppressed(box, heat[0, y, x], np.zeros(len(x), int), 0.35, 0.3))
    return found


def corners(centred: Array) -> Array:
    """Corners of boxes that are given by centre and size."""
    return np.concatenate([centred[:, :2] - centred[:, 2:] / 2, centred[:, :2] + centred[:, 2:] / 2], 1)


def overlaps(a: Array, b: Array) -> Array:
    """IoU of each box with each."""
    extent = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    common = extent.clip(0).prod(2)
    areas = (a[:, 2:] - a[:, :2]).prod(1)[:, None] + (b[:, 2:] - b[:, :2]).prod(1)[None]
    return common / np.maximum(areas - common, 1e-9)


def suppressed(box: Array, score: Array, kind: Array, least: float, overlap: float) -> Boxes:
    """Keep boxes in the order of their score that overlap no better one of their class."""
    kept: list[int] = []
    for i in (i for i in np.argsort(-score) if score[i] >= least):
        if all(kind[i] != kind[j] or overlaps(box[i : i + 1], box[j : j + 1])[0, 0] < overlap for j in kept):
            kept.append(i)
    return Boxes(box[kept], kind[kept])


def f1(found: list[Boxes], expected: list[Boxes]) -> float:
    hits = total = 0
    for a, b in zip(found, expected, strict=True):
        total += len(a.corners) + len(b.corners)
        match = overlaps(a.corners, b.corners) * (a.classes[:, None] == b.classes[None])
        while match.size and match.max() >= 0.5:
            i, j = np.unravel_index(match.argmax(), match.shape)
            match[i], match[:, j], hits = 0, 0, hits + 2
    return hits / total if total else 1.0
