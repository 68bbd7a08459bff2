"""The README's Python blocks run as they stand, one after the other."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)  # the blocks draw their data
    names = {}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)  # noqa: S102
    assert names["four_bits"].thresholds["3"].num_bits == 4
    assert (tmp_path / "int8.onnx").is_file()
    assert len(BLOCKS) == 6


def test_readme_opens_with_code():
    assert README.read_text(encoding="utf-8").index("klquant.optimal_threshold(hist, edges)") < 600
