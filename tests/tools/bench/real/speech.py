"""Speech out of a package, as a stream of windows for a voice detector."""

from pathlib import Path

import numpy as np
from scipy.io import wavfile
from scipy.signal import resample_poly

WINDOW, CONTEXT, RATE = 512, 64, 16000


def streams(folder: Path, part: str, count: int, seconds: float, seed: int) -> np.ndarray:
    """Streams (count, windows, 576) of half a conversation, at other loudness and speed, in noise, with pauses."""
    rate, recorded = wavfile.read(next((folder / "pyannote_audio").rglob("sample.wav")))
    sound = (recorded if recorded.ndim == 1 else recorded[:, 0]) / 32768
    half = np.array_split(sound, 2)[part == "test"]
    rng, length = np.random.default_rng(seed), int(seconds * RATE) // WINDOW * WINDOW
    return np.stack([windows(one(half, rate, length, rng)) for _ in range(count)])


def one(sound: np.ndarray, rate: int, length: int, rng: np.random.Generator) -> np.ndarray:
    speed = int(rng.integers(90, 112))
    taken = resample_poly(sound, RATE * 100, rate * speed)
    taken = np.roll(taken, rng.integers(len(taken)))[:length] * rng.uniform(0.2, 1.5)
    start = rng.integers(0, length - length // 4)
    taken[start : start + length // 4] *= 0.01
    noise = np.cumsum(rng.normal(size=length)) * 0.02 + rng.normal(size=length)
    return (taken + (noise - noise.mean()) / noise.std() * rng.choice([0, 0.002, 0.02])).clip(-1, 1).astype("f")


def windows(sound: np.ndarray) -> np.ndarray:
    """Windows of 512 samples, each with the 64 samples before it."""
    padded = np.concatenate([np.zeros(CONTEXT, "f"), sound])
    return np.stack([padded[at : at + CONTEXT + WINDOW] for at in range(0, len(sound), WINDOW)])
