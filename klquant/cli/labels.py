"""True classes from `--labels`: a file, or the folders of the images."""

from pathlib import Path
from typing import Any

import numpy as np

from klquant.errors import InvalidInputError

from .data import ARRAYS, Array, Batches, FirstSamples, files_of, load_arrays
from .images import SUFFIXES as IMAGES

FOLDERS = "folders"


def labels_of(labels: str, source: str, batches: Any) -> Array:
    """Return the class of each sample in the batches that were opened from this source.

    Raises
    ------
    InvalidInputError
        As for `open_labels`, and if there is not one label for each sample of the source.
    """
    found = open_labels(labels, source)
    if isinstance(batches, FirstSamples):
        return found[: batches.number]
    chosen = batches.chosen if isinstance(batches, Batches) else None
    if chosen is None:
        return found
    if len(found) != chosen.of:
        raise InvalidInputError(f"`--labels` must have one label for each of {chosen.of} samples, got {len(found)}")
    return found[chosen.samples]


def open_labels(labels: str, source: str) -> Array:
    """Return the class of each sample: from the folders of images, or from an .npy or .npz file.

    Raises
    ------
    InvalidInputError
        For another source, images outside of folders, and a file without one array of labels; naming it.
    """
    if labels == FOLDERS:
        return _labels_of_folders(Path(source))
    path = Path(labels)
    if not path.is_file() or path.suffix not in ARRAYS:
        raise InvalidInputError(f"`--labels` must be `{FOLDERS}` or an .npy or .npz file, got {labels!r}")
    content = load_arrays(path)
    if isinstance(content, dict):
        content = content["labels"] if "labels" in content else next(iter(content.values()))
    return np.asarray(content)


def _labels_of_folders(folder: Path) -> Array:
    """Return the number of each image's folder among the sorted folders."""
    images = files_of(folder, IMAGES) if folder.is_dir() else []
    if not images or any(path.parent == folder for path in images):
        raise InvalidInputError(f"`--labels {FOLDERS}` needs images in one folder for each class in `{folder}`")
    classes = [path.relative_to(folder).parts[0] for path in images]
    numbers = {name: k for k, name in enumerate(sorted(set(classes)))}
    return np.array([numbers[name] for name in classes])
