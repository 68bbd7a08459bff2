"""The README's Python blocks run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_block_runs(block):
    exec(compile(block, str(README), "exec"), {})  # noqa: S102


def test_readme_opens_with_code():
    assert README.read_text(encoding="utf-8").index("klquant.optimal_threshold(hist, edges)") < 600
