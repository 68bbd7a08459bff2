"""Text and files out of packages: sentences for encoders, words to draw, bytes of files."""

import re
from pathlib import Path

import numpy as np

from tools.bench.real.packages import DATA, folder_of


def sentences(folder: Path, part: str) -> list[str]:
    """Sentences of scikit-learn's descriptions of its data sets: every other file for each part."""
    files = sorted((folder / "scikit_learn").rglob("descr/*.rst"))[part == "test" :: 2]
    text = " ".join(re.sub(r"[*:`|_=\-+.]{2,}|:\w+:", " ", file.read_text("utf8")) for file in files)
    found = re.findall(r"[A-Z][^.!?]{30,160}[.!?]", re.sub(r"\s+", " ", text))
    return [sentence for sentence in found if sum(map(str.isalpha, sentence)) > 0.7 * len(sentence)]


def words(folder: Path, part: str, rng: np.random.Generator, count: int) -> list[str]:
    """Words of those sentences and numbers, as on signs and receipts."""
    known = sorted({word for text in sentences(folder, part) for word in re.findall(r"[A-Za-z]{2,12}[,.]?", text)})
    numbers = [f"{rng.integers(1, 10**5):,}", f"{rng.random() * 100:.2f}", f"{rng.integers(1900, 2030)}"]
    chosen = [str(rng.choice(numbers if rng.random() < 0.15 else known)) for _ in range(count)]
    return [word.upper() if rng.random() < 0.2 else word for word in chosen]


class WordPiece:
    """BERT's uncased tokenizer: words, then the longest pieces that its vocabulary has."""

    def __init__(self, vocabulary: Path) -> None:
        self.ids = {piece: i for i, piece in enumerate(vocabulary.read_text("utf8").splitlines())}

    def pieces(self, word: str) -> list[int]:
        start, found = 0, []
        while start < len(word):
            ends = (e for e in range(len(word), start, -1) if ("##" if start else "") + word[start:e] in self.ids)
            if (end := next(ends, None)) is None:
                return [self.ids["[UNK]"]]
            found.append(self.ids[("##" if start else "") + word[start:end]])
            start = end
        return found

    def __call__(self, texts: list[str], length: int) -> dict[str, np.ndarray]:
        """The inputs of BERT, padded to a length."""
        ids = np.full((len(texts), length), self.ids["[PAD]"], "i8")
        for row, text in zip(ids, texts, strict=True):
            found = [i for word in re.findall(r"\w+|[^\w\s]", text.lower()) for i in self.pieces(word)]
            taken = [self.ids["[CLS]"], *found[: length - 2], self.ids["[SEP]"]]
            row[: len(taken)] = taken
        return {
            "input_ids": ids,
            "attention_mask": (ids != self.ids["[PAD]"]).astype("i8"),
            "token_type_ids": np.zeros_like(ids),
        }


def file_bytes(folder: Path, part: str, count: int, seed: int) -> np.ndarray:
    """The first and last 1024 bytes of files of many kinds, as Magika reads them."""
    kinds: dict[str, list[Path]] = {}
    for path in sorted(path for name in DATA for path in (folder / folder_of(name)).rglob("*.*")):
        if path.is_file() and 100 < path.stat().st_size < 3e6:
            kinds.setdefault(path.suffix, []).append(path)
    rng, rows = np.random.default_rng(seed), []
    names = sorted(kinds)
    for i in range(10 * count):
        files = kinds[names[i % len(names)]][part == "test" :: 2]
        if files and len(rows) < count:
            rows.append(first_and_last(files[rng.integers(len(files))].read_bytes()))
    return np.stack(rows)


def first_and_last(content: bytes, size: int = 1024, block: int = 4096, padding: int = 256) -> np.ndarray:
    head, tail = content[:block].lstrip()[:size], content[-block:].rstrip()[-size:]
    return np.array([*head, *[padding] * (size - len(head)), *[padding] * (size - len(tail)), *tail], "i4")
