"""Let mkdocs find `klquant.backends`, whose folder lies beside that of `klquant`: read a copy that has it inside."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parents[1]


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: Any) -> Any:
    """Copy the sources to a temporary folder, and point mkdocstrings at it."""
    copy = Path(tempfile.mkdtemp(prefix="klquant-docs-"))
    only_python = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.html", "*.css", "*.js", "*.txt")
    shutil.copytree(ROOT / "klquant", copy / "klquant", ignore=only_python)
    shutil.copytree(ROOT / "backends", copy / "klquant" / "backends", ignore=only_python)
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(copy)]
    config["copied_sources"] = copy
    return config


def on_post_build(config: Any) -> None:
    """Remove the copy."""
    shutil.rmtree(config["copied_sources"], ignore_errors=True)
