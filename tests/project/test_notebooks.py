"""The notebooks in docs/notebooks/ run from top to bottom, and what they keep as output is what they print."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra `dev`")
pytest.importorskip("ipykernel", reason="needs the extra `dev`")
nbclient = pytest.importorskip("nbclient", reason="needs the extra `dev`")

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NUMBER = re.compile(r"-?\d+(\.\d+)?")

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the source tree")


def words_of(notebook):
    """Return the texts of the outputs, without numbers and pictures: times and CPUs differ."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    return [NUMBER.sub("#", text) for text in texts]


def test_there_are_four():
    assert len(NOTEBOOKS) == 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of Jupyter
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kept, fresh = (nbformat.read(path, as_version=4) for _ in range(2))
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(fresh, timeout=300, kernel_name="python3", resources=resources).execute()
    printed, shown = words_of(fresh), words_of(kept)
    assert len(printed) == len(shown) > 2
    assert [text.partition("\n")[0][:20] for text in printed] == [text.partition("\n")[0][:20] for text in shown]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_was_run(path):
    assert path.stat().st_size < 200_000
    notebook = nbformat.read(path, as_version=4)
    assert all(cell.outputs or "import" in cell.source for cell in notebook.cells if cell.cell_type == "code")
