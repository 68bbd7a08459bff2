"""What notebooks show of results: tables that are small, escaped, and never fail."""

import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from onnx import ModelProto

import klquant
from klquant.backends import onnx as onnx_backend
from klquant.backends import torch as torch_backend
from klquant.backends.calibration import Calibration
from klquant.backends.html_tables import html_skipped, html_table
from klquant.backends.settings import Settings
from klquant.backends.thresholds import LayerThreshold
from klquant.backends.torch import Diagnosis, LayerDiagnosis

DASH = "\N{EN DASH}"
EVIL = "<script>alert('&\"')</script>"
ODD = LayerThreshold(0.0, 127.0, math.nan, math.nan, math.inf, "none")


class Reader(HTMLParser):
    """Collects the cells of tables by rows, and all other texts; checks that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag in {"table", "caption", "thead", "tbody", "tr", "th", "td", "details", "summary"}
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        else:
            self.texts.append(data)


def rows_of(result):
    return Reader(result._repr_html_()).rows


def calibrated(thresholds, **more):
    amax = {name: found.amax for name, found in thresholds.items()}
    return Calibration.of(Settings())._replace(amax=amax, thresholds=thresholds, num_batches=3, **more)


def results(thresholds, skipped):
    """Return one of every kind of result that has a table of layers."""
    calibration = calibrated(thresholds, skipped=skipped)
    values = {name: found.threshold for name, found in thresholds.items()}
    return {
        "calibration": calibration,
        "observed": calibration._replace(thresholds={}),
        "torch": torch_backend.QuantizedModel(torch.nn.ReLU(), thresholds, {}, {}, [], skipped, calibration),
        "onnx": onnx_backend.QDQModel(ModelProto(), values, skipped),
        "diagnosis": Diagnosis([LayerDiagnosis(name, *[math.nan] * 6, "") for name in thresholds], math.nan, math.nan),
    }


KINDS = list(results({}, {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "shown"), [(0, 0), (1, 1), (30, 30), (31, 30), (200, 30)])
def test_at_most_thirty_layers_are_listed(kind, size, shown):
    rows = rows_of(results({f"layer {k}": ODD for k in range(size)}, {})[kind])
    assert [row[0] for row in rows[1 : shown + 1]] == [f"layer {k}" for k in range(shown)]
    assert rows[shown + 1 :] == ([[f"... {size - 30} more"]] if size > 30 else [])
    assert {len(row) for row in rows[: shown + 1]} == {len(rows[0])}


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_reasons_are_text(kind):
    html = results({EVIL: ODD._replace(criterion=EVIL)}, {EVIL: EVIL})[kind]._repr_html_()
    read = Reader(html)
    assert "<script" not in html
    assert EVIL in {cell for row in read.rows for cell in row}
    if kind != "diagnosis":
        assert read.rows[-1] == [EVIL, EVIL]
        assert "1 in floating point" in read.texts


def test_a_row_has_what_was_found():
    layers = {"fc": LayerThreshold(4.0, 3.0, 0.01234, 0.00012345, 38.06, "entropy", 8), "zero": ODD}
    assert rows_of(calibrated(layers)) == [
        ["tensor", "criterion", "amax", "T", "T/amax", "clipped", "KL nats", "SQNR dB"],
        ["fc", "entropy", "4", "3", "0.750", "0.0123%", "0.0123", "38.1"],
        ["zero", "none", "0", "127", DASH, DASH, DASH, "∞"],
    ]


def test_captions_say_what_it_is():
    found = results({"fc": ODD}, {})
    assert [Reader(result._repr_html_()).texts[0] for result in found.values()] == [
        "Calibration: 1 tensors, 3 batches",
        "Calibration: 1 tensors, 3 batches, no thresholds yet",
        "ReLU quantized: 1 layers",
        "ONNX model quantized: 1 activations",
        f"SQNR in dB, the most harmful layer first; {DASH} dB with all of them",
    ]


def test_a_diagnosis_lists_its_numbers_and_notes():
    layer = LayerDiagnosis("fc", 40.0, 38.04, 0.999, math.inf, -1.0, math.nan, EVIL)
    rows = rows_of(Diagnosis([layer], 30.0, 0.99))
    assert rows[1] == ["fc", "40.0", "38.0", "∞", "-1.0", DASH, EVIL]


def test_only_numbers_stand_at_the_right():
    html = html_table("", ("tensor", "T"), [("fc", 1)])
    assert '<td style="text-align: left">fc</td><td style="text-align: right">1</td>' in html
    assert "caption" not in html


def test_captions_and_titles_are_text():
    read = Reader(html_table(EVIL, (EVIL,), []))
    assert (read.texts, read.rows) == ([EVIL], [[EVIL]])


def test_without_layers_in_floating_point_nothing_is_said():
    assert html_skipped({}) == ""


def test_the_threshold_of_one_histogram_is_one_row(eager):
    arrays = [
        eager.asarray(array) for array in klquant.histogram(np.random.default_rng(0).normal(size=999), num_bins=9)
    ]
    found = klquant.percentile_threshold(*arrays, percentile=90, num_quantized_bins=3)
    value, clipped, sqnr_db = float(found), float(found.clipped), float(found.sqnr_db)
    assert rows_of(found) == [
        ["", "T", "index", "KL nats", "clipped", "SQNR dB"],
        ["Threshold", f"{value:.6g}", "-1", "nan", f"{clipped:.3%}", f"{sqnr_db:.1f}"],
    ]


def test_the_thresholds_of_a_batch_are_numbered():
    values = np.arange(1.0, 41.0).reshape(20, 2)
    rows = rows_of(klquant.Threshold(values, values.astype(np.int32), values * np.nan, values * np.inf, -values))
    assert rows[4] == ["Threshold[1, 1]", "4", "4", "nan", "inf%", "-4.0"]
    assert len(rows) == 32
    assert rows[-1] == ["... 10 more"]


def test_a_threshold_made_of_plain_numbers_has_a_table():
    assert rows_of(klquant.Threshold(1.5, -1, math.nan, 0.25, math.inf))[1][1:] == [
        "1.5",
        "-1",
        "nan",
        "25.000%",
        "inf",
    ]


def test_a_traced_threshold_has_no_table():
    jax = pytest.importorskip("jax")
    seen = []

    def look(hist, edges):
        found = klquant.max_threshold(hist, edges, num_quantized_bins=3)
        seen.append(found._repr_html_())
        return found.value

    jax.jit(look)(jax.numpy.ones(5), jax.numpy.linspace(-1, 1, 6))
    assert seen == [None]
