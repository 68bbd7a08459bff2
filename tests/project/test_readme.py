"""README.md and the pages in docs/ are correct: the code runs and prints what they show, and the links work.

The blocks of a page run from top to bottom in one namespace, in a folder that is empty at first.

``python``
    Code to run. If its first line is a comment with a file name, it is written to that file instead.
``text``
    The output of the ``python`` block before it, and klquant's warnings, as ``CalibrationWarning: ...``. Output or a
    warning that the page does not show is an error.
``sh``
    Commands, which must succeed. Those of klquant run in this process, torchrun in others. Commands that set up an
    environment are not run here: `.ci/run` does that.
``console``
    Commands after ``$``, and their output. ``klquant inspect`` may end with exit code 1.

A page must show the whole output, but a line ``...`` matches any number of lines. Words must be equal. Numbers must be
equal within 1 % or a unit of their last decimal, because CPUs and versions of torch differ in the order of sums.
"""

import itertools
import logging
import math
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from click.testing import CliRunner

import klquant
from klquant.cli import cli

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
         *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip
BASES = re.compile(r"https://(?:github.com/klquant/klquant/blob|raw.githubusercontent.com/klquant/klquant)/main/")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"# (\w+\.py)\n")
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
SET_UP = "python3 -m venv .venv && .venv/bin/pip install "
OTHERS = "torch|onnx|onnxscript|copyreg"  # modules whose own warnings do not matter here

NEEDS = {"docs/jax.md": "jax", "docs/howto-huggingface.md": "transformers"}  # beside the extras of every run
needs_docs = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs the source tree")


class Block(NamedTuple):
    kind: str
    content: str


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks_of(page):
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


def run_python(code, names, where):
    """Run a block, or write it to the file that it names. Return the lines that it prints."""
    if file := FILE.match(code):
        Path(file[1]).write_text(code, encoding="utf-8")
        sys.modules.pop(Path(file[1]).stem, None)  # left by another test
        return []
    with warnings.catch_warnings(record=True) as caught, redirect_stdout(StringIO()) as printed:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module=OTHERS)
        warnings.simplefilter("always", klquant.CalibrationWarning)
        exec(compile(code, where, "exec"), names)  # noqa: S102
    told = [f"{entry.category.__name__}: {entry.message}" for entry in caught]
    return printed.getvalue().splitlines() + told


def run_command(line):
    """Run one command line, and return the lines that it prints."""
    program, *arguments = shlex.split(line, comments=True)
    if line.startswith(SET_UP):
        return []
    if program == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout.splitlines()
    assert program == "klquant", f"do not know how to test `{line}`"
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0 or (arguments[0] == "inspect" and result.exit_code == 1), result.output
    return result.output.splitlines()


def commands_in(content):
    return content.replace("\\\n", " ").splitlines()


def check_console(content):
    """Run the commands of a transcript, and compare their output."""
    lines, shown = commands_in(content), []
    assert lines[0].startswith("$ ")
    for line in lines:
        if line.startswith("$ "):
            shown.append((line.removeprefix("$ "), []))
        else:
            shown[-1][1].append(line)
    for command, expected in shown:
        check_shown(expected, run_command(command))


def check_shown(shown, printed):
    """Compare lines, where `...` matches any number of them."""
    printed = iter([line for line in printed if line.strip()])
    shown = [line for line in shown if line.strip()]
    for line, following in itertools.zip_longest(shown, shown[1:]):
        if line.strip() != "...":
            assert alike(line, next(printed, "")), f"shown: {line}"
        elif following is not None:
            found = next((other for other in printed if alike(following, other)), None)
            assert found is not None, f"shown: {following}"
            printed = itertools.chain([found], printed)
        else:
            return
    assert not list(printed)


def alike(shown, printed):
    """Return whether two lines have the same words and nearly the same numbers."""
    words = [NUMBER.sub("#", line).split() for line in (shown, printed)]
    numbers = zip(*(NUMBER.findall(line) for line in (shown, printed)), strict=True)
    return words[0] == words[1] and all(near(*pair) for pair in numbers)


def near(shown, printed):
    """Return whether a number is right within 1 %, or within a unit of the last decimal place shown."""
    places = Decimal(shown).as_tuple().exponent
    return math.isclose(float(shown), float(printed), rel_tol=0.01, abs_tol=10.0**places if places < 0 else 0)


def anchors_of(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty folder in which a page runs, importable as for `python` in that folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # the exporter logs that torchvision is missing
    yield tmp_path
    logger.setLevel(level)
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
@pytest.mark.usefixtures("folder")
def test_page(page):
    pytest.importorskip(NEEDS.get(name_of(page), "klquant"))
    torch.manual_seed(0)
    names, printed = {"__name__": "page"}, []
    for kind, content in blocks_of(page):
        if kind == "text":
            check_shown(content.splitlines(), printed)
            printed = []
            continue
        assert not printed, f"not shown: {printed}"
        if kind == "python":
            printed = run_python(content, names, name_of(page))
        elif kind == "console":
            check_console(content)
        else:
            assert kind == "sh"
            for line in commands_in(content):
                run_command(line)
    assert not printed, f"not shown: {printed}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_of_a_kind_that_is_tested(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(blocks_of(page))
    assert {kind for kind, _ in blocks_of(page)} <= {"python", "text", "sh", "console"}


@needs_docs
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in LINK.findall(BLOCK.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        if base := BASES.match(path):  # absolute, for PyPI
            target = ROOT / path[base.end() :]
        elif link.startswith("https://"):
            continue
        else:
            target = page.parent / path if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors_of(target), link


@needs_docs
def test_every_page_is_linked_in_the_readme_by_its_full_address():
    links = [link.partition("#")[0] for link in LINK.findall(PAGES[0].read_text(encoding="utf-8"))]
    assert all(link.startswith("https://") for link in links)
    site = {"docs/index.md", *(f"docs/{name}.md" for name in ("changelog", "contributing", "security"))}
    assert {name_of(page) for page in PAGES[1:]} - site <= {BASES.sub("", link) for link in links}


def test_readme_is_short_and_opens_with_the_one_command():
    text = PAGES[0].read_text(encoding="utf-8")
    assert text.index("klquant auto model.onnx --data photos/") < 600
    assert text.count("\n") <= 120


@needs_docs
def test_the_backend_is_short():
    [code] = [code for _, code in blocks_of(ROOT / "docs" / "backends.md") if code.startswith("# mlp_backend.py")]
    assert len(code.splitlines()) < 60


@needs_docs
def test_the_picture_is_what_its_script_draws(tmp_path):
    """Only words and numbers are compared, because versions of matplotlib draw different lines."""
    runpy.run_path(str(ROOT / "docs" / "draw_search.py"))["main"](tmp_path / "search.svg")
    drawn, kept = (path.read_text(encoding="utf-8") for path in (tmp_path / "search.svg", ROOT / "docs" / "search.svg"))
    words = [re.findall(r">([^<>\n]+)</text>", svg) for svg in (drawn, kept)]
    assert words[0] == words[1]
    assert any("clipped" in word for word in words[0])


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        (["T = 1.02"], ["T = 1.00"]),
        (["6 of 6"], ["5 of 6"]),
        (["T = 1"], ["U = 1"]),
        (["a"], ["a", "b"]),
        (["a", "b"], ["a"]),
        (["a", "...", "d"], ["a", "b", "c"]),
        (["a", "...", "c"], ["a", "b", "c", "d"]),
        (["T = 1.0"], ["T = -1.0"]),
        ([], ["a"]),
    ],
)
def test_what_is_not_printed_is_noticed(shown, printed):
    with pytest.raises(AssertionError):
        check_shown(shown, printed)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        (["T =  1.001", ""], ["T = 1.0 "]),
        (["0.001%"], ["0.002%"]),
        (["a", "...", "c"], ["a", "b", "b", "c"]),
        (["a", "..."], ["a", "b", "c"]),
        (["...", "b", "c"], ["a", "b", "c"]),
        (["a", "...", "b"], ["a", "b"]),
    ],
)
def test_what_is_printed_is_found(shown, printed):
    check_shown(shown, printed)
