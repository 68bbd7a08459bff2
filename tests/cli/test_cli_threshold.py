"""`klquant threshold` and what commands take from a saved calibration."""

import json
import math
import re
import sys

import numpy as np
import pytest
from click.testing import CliRunner

import klquant
from klquant.backends.calibration import Calibration
from klquant.backends.settings import Settings
from klquant.backends.text import THRESHOLD_COLUMNS
from klquant.cli import cli
from klquant.cli.options import load_calibration
from klquant.cli.output import print_table
from klquant.errors import InvalidInputError

CRITERIA = ["entropy", "max", "percentile", "mse"]
pytestmark = pytest.mark.filterwarnings("ignore:layer `.*`. (T =|expected SQNR):klquant.errors.CalibrationWarning")


def run(*arguments):
    return CliRunner().invoke(cli, ["threshold", *map(str, arguments)], catch_exceptions=False)


def records(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout, parse_constant=pytest.fail)


@pytest.fixture
def histogram():
    """Half of the values are zeros; the outermost bins are empty."""
    data = np.random.default_rng(0).laplace(size=20_000)
    return klquant.histogram(np.concatenate([data, np.zeros(20_000)]), num_bins=1001, amax=20.0)


@pytest.fixture
def saved(tmp_path, histogram):
    path = tmp_path / "hist.npz"
    np.savez(path, **histogram._asdict())
    return path


@pytest.fixture
def calibration(tmp_path, histogram):
    """`a [0]` has a fixed threshold; one tensor is always 0."""
    names = ["a [0]", "b"]
    settings = Settings.make(num_bins=1001, overrides={"a*": {"criterion": "max", "threshold": 3.0}})
    found = Calibration.of(settings)._replace(
        amax={**dict.fromkeys(names, 20.0), "zero": 0.0}, histograms=dict.fromkeys(names, histogram)
    )
    path = tmp_path / "calib.npz"
    found.save(path)
    return path


def test_every_criterion_gives_the_result_of_a_calibration(saved, histogram):
    found = {record["criterion"]: record for record in records(saved)}
    assert list(found) == CRITERIA
    hist = histogram.hist.copy()
    hist[500] = 0
    exact = klquant.optimal_threshold(hist, histogram.edges)
    entropy = found["entropy"]
    assert entropy["threshold"] == float(exact)
    assert entropy["divergence"] == float(exact.divergence)
    assert entropy["sqnr_db"] == float(exact.sqnr_db)
    assert entropy["clipped"] == pytest.approx(float(exact.clipped) * hist.sum() / histogram.hist.sum())
    assert entropy["scale"] == float(exact) / 127
    assert found["mse"]["threshold"] == float(klquant.mse_threshold(hist, histogram.edges))
    assert found["max"]["threshold"] == float(klquant.max_threshold(hist, histogram.edges)) < 20
    assert found["max"]["divergence"] is None


def test_the_table_shows_the_same(saved):
    title, columns, _, *rows = run(saved).stdout.splitlines()
    expected = records(saved)
    assert title == str(saved)
    assert re.split(r"\s\s+", columns.strip()) == ["tensor", *THRESHOLD_COLUMNS]
    assert [row.split()[1] for row in rows] == CRITERIA
    for row, record in zip(rows, expected, strict=True):
        _, _, amax, threshold, ratio, clipped, *divergence, sqnr = row.split()
        assert float(threshold) == pytest.approx(record["threshold"], rel=1e-3)
        assert float(ratio) == pytest.approx(record["threshold"] / record["amax"], abs=1e-3)
        assert float(amax) == pytest.approx(record["amax"], rel=1e-3)
        assert float(clipped.rstrip("%")) == pytest.approx(100 * record["clipped"], abs=1e-3)
        assert float(sqnr) == pytest.approx(record["sqnr_db"], abs=0.1)
        assert len(divergence) == (record["criterion"] == "entropy")


def test_long_names_are_whole_in_a_pipe_and_in_a_narrow_terminal(capsys, monkeypatch):
    name = "/stage1" * 30 + "[bold]"
    print_table("title", ("tensor", "T"), [(name, "1.5")])
    assert capsys.readouterr().out.splitlines()[-1].split() == [name, "1.5"]
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table("title", ("tensor", "T"), [(name, "1.5")])
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 40
    assert "".join(line.split()[0] for line in lines[3:]) == name


def test_counts_with_amax_are_the_same_histogram(tmp_path, saved, histogram):
    np.savez(tmp_path / "c.npz", counts=histogram.hist, amax=20.0)
    plain = [{**record, "tensor": "counts"} for record in records(saved)]
    assert records(tmp_path / "c.npz") == plain
    np.savez(tmp_path / "k.npz", conv1=histogram.hist, most=[20.0], other=3)
    named = records(tmp_path / "k.npz", "--key", "conv1", "most")
    assert [record["threshold"] for record in named] == [record["threshold"] for record in plain]


def test_fewer_bits_clip_more(saved):
    eight, four = records(saved)[0], records(saved, "--num-bits", 4)[0]
    assert four["threshold"] < eight["threshold"]
    assert four["scale"] == four["threshold"] / 7


@pytest.mark.parametrize(
    ("arrays", "arguments", "message"),
    [
        ({"hist": np.ones(1000, int), "edges": np.linspace(-1, 1, 1001)}, [], "`hist` must have an odd number of bins"),
        ({"hist": np.ones(301, int)}, [], "must contain the arrays hist and edges, got ['hist']"),
        ({"hist": np.zeros(301, int), "edges": np.linspace(-1, 1, 302)}, [], "got an empty histogram"),
        ({"hist": np.ones(301, int), "edges": 1.0}, ["--key", "hist", "amax"], "without ['amax']"),
        ({"hist": np.ones(301, int), "edges": np.nan}, [], "`amax` must be"),
        ({"hist": np.ones(301, int), "edges": 1.0}, ["--tensor", "hist"], "`--tensor` must be left out"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, arrays, arguments, message):
    np.savez(tmp_path / "other.npz", **arrays)
    result = run(tmp_path / "other.npz", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_without_names_is_refused(tmp_path):
    np.save(tmp_path / "hist.npy", np.ones(301))
    result = run(tmp_path / "hist.npy")
    assert (result.exit_code, "must be an .npz file" in result.stderr) == (2, True)


def test_a_calibration_is_listed_by_tensor(calibration, saved):
    found = records(calibration)
    assert [record["tensor"] for record in found] == ["a [0]"] * 4 + ["b"] * 4 + ["zero"]
    assert [record["criterion"] for record in found] == [*CRITERIA, *CRITERIA, "none"]
    assert found[0]["threshold"] == records(saved)[0]["threshold"]
    assert found[-1]["sqnr_db"] is None
    assert "a [0]" in run(calibration).stdout
    assert [record["tensor"] for record in records(calibration, "--tensor", "b")] == ["b"] * 4
    assert records(calibration, "--tensor", "b", "--num-bits", "4")[0]["num_bits"] == 4


def test_a_tensor_that_is_not_there_is_named_with_others_like_it(calibration):
    result = run(calibration, "--tensor", "a[0]")
    assert result.exit_code == 2
    assert "got ['a[0]']; similar to the first: ['a [0]'" in result.stderr


# --- the thresholds that other commands take ---


@pytest.mark.filterwarnings("ignore:layer `zero`")
def test_a_calibration_without_thresholds_is_searched(calibration):
    found = load_calibration(calibration).thresholds
    assert {name: t.criterion for name, t in found.items()} == {"a [0]": "fixed", "b": "entropy", "zero": "none"}


@pytest.mark.filterwarnings("ignore:layer `zero`")
def test_only_what_is_asked_for_is_searched_again(calibration):
    first = load_calibration(calibration, criterion="mse")
    assert first.thresholds["b"].criterion == "mse"
    first.save(calibration)
    assert repr(load_calibration(calibration).thresholds) == repr(first.thresholds)  # NaN is equal to NaN here
    again = load_calibration(calibration, overrides={"b": {"criterion": "max"}}).thresholds
    assert again["b"].criterion == "max"
    assert math.isnan(again["b"].divergence)
    assert repr(again["a [0]"]) == repr(first.thresholds["a [0]"])
    assert load_calibration(calibration, criterion="percentile").thresholds["b"].criterion == "percentile"


def test_a_misspelt_override_is_refused(calibration):
    with pytest.raises(InvalidInputError, match=r"pattern `conv\*` matches none of 3 layers"):
        load_calibration(calibration, overrides={"conv*": {"criterion": "max"}})


def test_weights_with_a_total_below_1_are_counted_as_what_they_are(tmp_path, histogram):
    """But by the entropy criterion, to which small weights are no counts."""
    share = {}
    for name, total in {"counts": 1, "weights": 3 * histogram.hist.sum()}.items():
        np.savez(tmp_path / f"{name}.npz", hist=histogram.hist / total, edges=histogram.edges)
        share[name] = [record["clipped"] for record in records(tmp_path / f"{name}.npz")[1:]]
    assert share["weights"] == pytest.approx(share["counts"])


@pytest.mark.parametrize("shape", [(100_000_001,), (1, 1001), ()], ids=["many bins", "two dimensions", "one number"])
def test_a_histogram_that_is_none_or_too_long_is_refused(tmp_path, histogram, shape):
    np.savez_compressed(tmp_path / "h.npz", hist=np.zeros(shape, np.uint8), amax=1.0)
    result = run(tmp_path / "h.npz", "--key", "hist", "amax")
    assert result.exit_code == 2
    assert "`hist` of" in result.stderr
    assert "must have shape (n,) with n <= 65537, got " in result.stderr


def test_names_do_not_act_on_the_terminal(tmp_path, histogram):
    names = ["\x1b[31mred", "[bold]x[/bold]", ":smile:", "a\nb\rc", "\u202eabc", "\x9b2J", "größe"]
    found = Calibration.of(Settings.make(num_bins=1001))._replace(
        amax=dict.fromkeys(names, 20.0), histograms=dict.fromkeys(names, histogram)
    )
    found.save(tmp_path / "c.npz")
    output = run(tmp_path / "c.npz").stdout
    for shown in ("\\x1b[31mred", "[bold]x[/bold]", ":smile:", "a\\nb\\rc", "\\u202eabc", "\\x9b2J", "größe"):
        assert f"{shown} " in output
    assert all(letter.isprintable() for letter in output.replace("\n", ""))
