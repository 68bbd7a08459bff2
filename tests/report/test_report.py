"""What a report says about a calibration, how it is drawn, and the page as text. The browser has its own tests."""

import itertools
import json
import math
import re
import sys
import time
import warnings
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner

import klquant
from klquant import CalibrationWarning, InvalidInputError, MissingDependencyError
from klquant.backends.calibration import Calibration
from klquant.backends.report import describe, render_html, write_report
from klquant.backends.report.charts import sparkline, sum_bars, thin_curve
from klquant.backends.settings import Settings
from klquant.backends.thresholds import candidate_thresholds
from klquant.cli.commands.report import report as command
from support import report_cases
from support.report_cases import DEAD, HOSTILE, OUTLIER


@pytest.fixture(scope="module")
def calibration():
    return report_cases.calibration()


@pytest.fixture(scope="module")
def peculiar():
    return report_cases.peculiar()


def by_name(report):
    return {tensor.name: tensor for tensor in report.tensors}


def plain(report):
    return json.loads(report.as_json(), parse_constant=pytest.fail)


def test_every_tensor_has_the_numbers_of_the_calibration(calibration):
    tensors = by_name(describe(calibration))
    assert list(tensors) == list(calibration.amax)
    for name, found in calibration.thresholds.items():
        tensor, chosen = tensors[name], tensors[name].chosen
        assert (tensor.amax, tensor.num_bits, tensor.calls) == (found.amax, 8, 1)
        assert tensor.num_values == calibration.histograms[name].hist.sum()
        assert tensor.num_zeros == calibration.histograms[name].hist[500]
        assert chosen[:2] == (found.criterion, found.threshold)
        assert chosen[2:] == (found.threshold / found.amax, found.clipped, found.sqnr_db, found.divergence)


def test_every_criterion_is_tried_whatever_was_asked_for(calibration):
    asked = report_cases.calibration(overrides={"features.3.*": {"criterion": "max"}, "features.6.*": {"threshold": 2}})
    candidates = candidate_thresholds(asked.amax, asked.histograms, {})
    tensors = by_name(describe(asked))
    for name, tensor in tensors.items():
        assert list(tensor.criteria) == ["entropy", "max", "percentile", "mse"]
        assert {key: one.threshold for key, one in tensor.criteria.items()} == {
            key: found[name].threshold for key, found in candidates.items()
        }
    assert [tensor.chosen.criterion for tensor in tensors.values()][:3] == ["entropy", "max", "fixed"]


def test_fewer_bits_have_their_own_thresholds():
    tensor = describe(report_cases.calibration(1, num_bits=4)).tensors[0]
    histogram = report_cases.calibration(1).histograms[tensor.name]
    assert tensor.num_bits == 4
    assert tensor.curve == thin_curve(histogram, num_quantized_bins=15)
    assert tensor.criteria["entropy"] == tensor.chosen


def test_more_levels_than_bins_leave_nothing_to_compare():
    found = report_cases.calibration(1, num_bits=12, overrides={"*": {"threshold": 0.5}})
    tensor = describe(found).tensors[0]
    assert (tensor.criteria, tensor.curve, tensor.chosen.threshold) == ({}, None, 0.5)
    assert tensor.bars is not None


def test_thresholds_that_are_missing_are_searched(calibration):
    unsearched = calibration._replace(thresholds={})
    assert plain(describe(unsearched)) == plain(describe(calibration))


def test_warnings_are_those_of_the_search(peculiar):
    with pytest.warns(CalibrationWarning) as caught:
        peculiar.search_thresholds()
    reported = [f"layer `{t.name}`: {text}" for t in describe(peculiar).tensors for text in t.warnings]
    assert reported == [warning.message.message for warning in caught]
    assert len(reported) == 2


def test_a_fixed_threshold_that_clips_too_much_is_warned_of():
    found = report_cases.calibration(1, overrides={"*": {"threshold": 0.1}})
    assert "clips" in describe(found).tensors[0].warnings[0]


def test_a_range_that_was_cut_is_warned_of(calibration):
    found = calibration._replace(settings=calibration.settings._replace(max_amax=5.9))
    assert [t.name for t in describe(found).tensors if t.warnings] == ["features.15.conv"]


def test_a_dead_tensor_has_neither_histogram_nor_criteria(peculiar):
    tensor = by_name(describe(peculiar))[DEAD]
    assert (tensor.bars, tensor.curve, tensor.criteria, tensor.num_values) == (None, None, {}, 0)
    assert tensor.warnings == ["all its values are 0; it gets scale 1"]


def test_the_json_is_the_report_with_null_for_what_is_no_number(peculiar):
    content = plain(describe(peculiar, title="T", diagnosis=report_cases.diagnosis([HOSTILE])))
    assert content["title"] == "T"
    assert content["settings"]["overrides"][OUTLIER]["percentile"] == 95
    assert content["skipped"] == {HOSTILE: HOSTILE}
    assert content["transforms"] == peculiar.transforms
    assert content["versions"]["klquant"] == klquant.__version__
    tensors = {tensor["name"]: tensor for tensor in content["tensors"]}
    assert tensors[HOSTILE]["measured_sqnr_db"] == 30.5
    assert tensors[OUTLIER]["measured_sqnr_db"] is None
    assert tensors[DEAD]["chosen"]["divergence"] is None
    assert content["diagnosis"]["layers"][0]["without_sqnr_db"] is None


@pytest.mark.parametrize("num_bins", [3, 255, 801, 803, 1001, 4001, 4801])
def test_bars_are_sums_of_the_bins_between_their_edges(num_bins):
    hist = np.random.default_rng(0).integers(1, 1000, num_bins)
    histogram = klquant.Histogram(hist, klquant.histogram(np.zeros(0), num_bins=num_bins, amax=3.0).edges)
    bars = sum_bars(histogram)
    ends = [
        (0.5 + min(k * bars.bins_per_bar, num_bins // 2)) * bars.bin_width for k in range(len(bars.counts) // 2 + 1)
    ]
    edges = np.array([-end for end in ends[::-1]] + ends)
    at = np.searchsorted((histogram.edges[1:] + histogram.edges[:-1]) / 2, edges)
    assert bars.counts == [hist[i:j].sum() for i, j in itertools.pairwise(at)]
    assert sum(bars.counts) == hist.sum()
    assert len(bars.counts) <= 801
    assert edges[-1] == pytest.approx(3.0)


def test_the_curve_keeps_the_minimum_and_invents_nothing():
    histogram = report_cases.counts(0, num_bins=4001)
    best = klquant.optimal_threshold(np.where(np.arange(4001) == 2000, 0, histogram.hist), histogram.edges)
    curve = thin_curve(histogram, num_quantized_bins=255)
    assert curve.candidates_per_point == 5
    assert len(curve.thresholds) == len(curve.divergences) <= 400
    lowest = int(np.argmin(curve.divergences))
    assert curve.thresholds[lowest] == pytest.approx(best.value, rel=1e-5)
    assert curve.divergences[lowest] == pytest.approx(best.divergence, rel=1e-5)
    assert np.all(np.diff(curve.thresholds) > 0)
    assert (curve.tie_low, curve.tie_high) == pytest.approx((float(best.tie_low), float(best.tie_high)), rel=1e-5)


def test_a_sparkline_is_as_high_as_the_logarithm_of_the_counts():
    hist = np.zeros(4001, np.int64)
    hist[3000], hist[3900] = 999, 9
    edges = klquant.histogram(np.zeros(0), num_bins=4001, amax=1.0).edges
    tops = [float(top) for top in re.findall(r"V([\d.]+)h", sparkline(sum_bars(klquant.Histogram(hist, edges))))]
    assert {k: 18 - top for k, top in enumerate(tops) if top < 18} == pytest.approx({29: 17, 38: 17 / 3}, rel=0.01)


def test_ranges_of_the_weights(calibration):
    scales = {"features.0.conv": np.array([0.0, 1.0, 3.0, 2.0]), "head": [0.5], "dead": np.zeros(3)}
    first, head, dead = describe(calibration, weight_scales=scales).weights
    assert first[:-1] == ("features.0.conv", 4, 1, 127.0, 254.0, 381.0, 2)
    assert first.profile == [381.0, 254.0, 127.0, 0.0]
    assert head[:-1] == ("head", 1, 0, 63.5, 63.5, 63.5, 0)
    assert dead[1:-2] == (3, 3, 0.0, 0.0, 0.0)


def test_many_channels_are_thinned_with_both_ends(calibration):
    scales = {"features.0.conv": np.arange(1, 1001) / 127}
    profile = describe(calibration, weight_scales=scales).weights[0].profile
    assert len(profile) == 64
    assert (profile[0], profile[-1]) == (1000, 1)


@pytest.mark.parametrize("scale", [[], [math.nan], [-1.0], [1.0, 1e307], [[1.0], [2.0]], "much", None], ids=str)
def test_scales_that_are_none_are_refused(calibration, scale):
    with pytest.raises(InvalidInputError, match=r"`weight_scales` of layer `features\.0\.conv`"):
        describe(calibration, weight_scales={"features.0.conv": scale})


def broken(**changes):
    content = report_cases.diagnosis(["features.0.conv"])
    content["layers"][0] |= changes
    return content


@pytest.mark.parametrize(
    ("diagnosis", "match"),
    [
        ("text", "must be a Diagnosis or its JSON with layers, got str"),
        ({}, "must be a Diagnosis or its JSON with layers, got dict"),
        ({"layers": []}, "model_sqnr_db of the model, got 'nothing'"),
        (broken(name=3), "must name each of its layers"),
        (broken(name="other"), r"must be of the calibrated layers, got others: \['other'\]"),
        (broken(alone_sqnr_db="30"), "alone_sqnr_db of layer `features.0.conv`, got '30'"),
        (broken(output_cosine=True), "output_cosine of layer `features.0.conv`, got True"),
    ],
)
def test_a_diagnosis_of_something_else_is_refused(calibration, diagnosis, match):
    with pytest.raises(InvalidInputError, match=match):
        describe(calibration, diagnosis=diagnosis)


def test_a_diagnosis_object_is_read_by_its_json(calibration):
    class Diagnosis:
        def as_json(self):
            return json.dumps(report_cases.diagnosis(["features.3.conv"]))

    found = describe(calibration, diagnosis=Diagnosis())
    assert found.diagnosis == report_cases.diagnosis(["features.3.conv"])
    assert by_name(found)["features.3.conv"].measured_sqnr_db == 30.5


ATTACKS = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "</title><svg onload=alert(1)>",
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    "--><b>",
    "]]><b>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt;\u2028\0",
]


class Elements(HTMLParser):
    """Counts elements by their names and attributes."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def handle_starttag(self, tag, attributes):
        self.found[(tag, *(name for name, _ in attributes))] += 1


def elements(page):
    parser = Elements()
    parser.feed(page)
    return parser.found


def test_names_are_text_in_the_page(peculiar):
    found = describe(peculiar, title=HOSTILE, diagnosis=report_cases.diagnosis([HOSTILE]), weight_scales={HOSTILE: [1]})
    page = render_html(found)
    assert "<script>document" not in page
    assert len(re.findall(r"<script", page)) == 6
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    assert json.loads(data) == plain(found)


def test_no_name_adds_an_element_or_an_attribute(calibration):
    """Whatever names are, the page has the elements and attributes that it has with plain ones."""
    found = calibration._replace(skipped={}, transforms={"fold": [{"module": "", "reason": ""}]})

    def renamed(name):
        first = next(iter(found.amax))
        fields = {key: dict(getattr(found, key)) for key in ("amax", "histograms", "thresholds", "calls", "model")}
        for values in fields.values():
            values[name] = values.pop(first)
        rows = [{name: name, "module": name}]
        return found._replace(**fields, skipped={name: name}, transforms={name: rows}, versions={"klquant": name})

    pages = [elements(render_html(describe(renamed(name), title=name))) for name in ("plain", *ATTACKS)]
    assert all(page == pages[0] for page in pages)


def test_many_rows_are_listed_in_no_time(calibration):
    rows = [{"module": str(k), "reason": ""} for k in range(30_000)]
    start = time.process_time()
    page = render_html(describe(calibration._replace(amax={}, transforms={"fold": rows})))
    assert time.process_time() - start < 5
    assert ">29999<" in page


def test_the_page_needs_nothing_else(calibration):
    page = render_html(describe(calibration))
    links = re.findall(r'(?:src|href|action)="([^"]*)"', page)
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.findall(r"url\(|@import|\bfetch\(|XMLHttpRequest|<link|<img|<iframe", page)
    assert "default-src 'none'" in page


def test_the_licence_of_the_charts_is_in_the_page(calibration):
    assert "Copyright (c) 2022 Leon Sorokin" in render_html(describe(calibration))


SECTIONS = ("ways", "next", "guard", "sensitivity", "weights", "prepared", "skipped")


def sections_of(page):
    found = [name for name in SECTIONS if f'<section id="{name}"' in page]
    assert [name for name in SECTIONS if f'href="#{name}"' in page] == [name for name in found if name != "next"]
    return found


def test_what_is_not_known_has_no_place(calibration):
    bare = calibration._replace(transforms={"fold": []}, skipped={})
    page = render_html(describe(bare))
    assert sections_of(page) == []
    assert "SQNR meas." not in page
    known = describe(calibration, diagnosis=report_cases.diagnosis(calibration.amax), weight_scales={"a": [1]})
    page = render_html(known)
    assert sections_of(page) == ["sensitivity", "weights", "prepared", "skipped"]
    assert "SQNR meas." in page


def test_the_verdict_comes_first_with_the_ways_and_what_to_do_next(calibration):
    ways = [{"method": "entropy", "SQNR dB": "20.0"}, {"method": "* <mse>", "SQNR dB": "30.0"}]
    steps = ["klquant tune <x>  # without the worst", "# pass more data"]
    page = render_html(describe(calibration, verdict="Accurate & small", ways=ways, next_steps=steps))
    assert sections_of(page)[:2] == ["ways", "next"]
    assert page.index("Accurate &amp; small") < page.index("<nav")
    assert '<tr class="picked"><th scope="row">* &lt;mse&gt;</th>' in page
    assert 'data-copy="klquant tune &lt;x&gt;"' in page  # the command without its comment
    assert '<span class="note">without the worst</span>' in page
    assert page.count("data-copy=") == 1
    assert "pass more data" in page


def test_the_worst_tensor_is_named_before_all_others(peculiar):
    found = describe(peculiar)
    assert found.worst.name == report_cases.OUTLIER
    page = render_html(found)
    first = page.index(f'data-pick="{report_cases.OUTLIER}"')
    assert first < page.index("<nav")
    assert "2 tensors have warnings, of" in page
    measured = describe(peculiar, diagnosis={**report_cases.diagnosis([]), "layers": [
        {**report_cases.diagnosis(["features.0.conv"])["layers"][0], "activation_sqnr_db": 1.5}
    ]})  # fmt: skip
    assert measured.worst.name == "features.0.conv"


def test_better_criteria_can_be_copied(peculiar):
    found = describe(peculiar)
    assert found.better == {report_cases.OUTLIER: "mse"}
    page = render_html(found)
    assert 'data-copy="overrides={&#34;outlier&#34;: {&#34;criterion&#34;: &#34;mse&#34;}}"' in page
    assert 'data-copy="--override outlier=mse"' in page


def test_the_guard_is_shown_before_and_after():
    rng = np.random.default_rng(0)
    x = rng.standard_t(1.8, size=20_000)
    histogram = klquant.histogram(x, num_bins=2001)
    blank = Calibration.of(Settings())._replace(amax={"tail": float(np.abs(x).max())}, histograms={"tail": histogram})
    found = describe(blank._replace(thresholds=blank.search_thresholds()))
    (tensor,) = found.tensors
    assert tensor.guard
    page = render_html(found)
    assert sections_of(page) == ["guard"]
    row = re.search(r'<section id="guard".*?<tbody>(.*?)</tbody>', page, re.DOTALL)[1]
    numbers = re.findall(r'data-value="([-\d.e]+)"', row)
    before, after = tensor.criteria["entropy"], tensor.chosen
    expected = [before.sqnr_db, after.sqnr_db, after.sqnr_db - before.sqnr_db, before.threshold, after.threshold]
    assert [float(one) for one in numbers] == pytest.approx(expected)


def test_the_same_calibration_gives_the_same_bytes(calibration, tmp_path):
    pages = [tmp_path / "a.html", tmp_path / "b.html"]
    for page in pages:
        write_report(calibration, page)
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_an_empty_calibration_has_a_page(calibration):
    nothing = calibration._replace(amax={}, histograms={}, thresholds={}, model={}, transforms={}, skipped={})
    assert "0 tensors observed" in render_html(describe(nothing))


def test_200_tensors_are_less_than_5_mb():
    assert 2e6 < len(report_cases.big_page().encode()) < 5e6


def test_the_path_of_a_calibration_is_none():
    with pytest.raises(InvalidInputError, match=r"expected a Calibration, got str; Calibration\.load\(path\)"):
        describe("calib.npz")


def test_a_missing_library_is_named(calibration, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match=r"klquant\[report\]"):
        render_html(describe(calibration))


def run(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_the_command_writes_page_and_json(peculiar, tmp_path):
    peculiar.save(tmp_path / "calib.npz")
    (tmp_path / "diagnosis.json").write_text(json.dumps(report_cases.diagnosis([HOSTILE])))
    page, arguments = tmp_path / "new" / "report.html", ["--diagnosis", tmp_path / "diagnosis.json"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tmp_path / "calib.npz", "-o", page, *arguments).output == f"{page}: 9 tensors, 2 with warnings\n"
        page.unlink()
        done = run(tmp_path / "calib.npz", "-o", page, *arguments, "--json")
    assert done.exit_code == 0
    content = json.loads(done.stdout)
    assert content == plain(describe(peculiar, title="calib.npz", diagnosis=report_cases.diagnosis([HOSTILE])))
    assert "<title>calib.npz</title>" in page.read_text(encoding="utf-8")


def test_the_command_takes_a_title(calibration, tmp_path):
    calibration.save(tmp_path / "calib.npz")
    run(tmp_path / "calib.npz", "-o", tmp_path / "r.html", "--title", "Digits & more")
    assert "<h1>Digits &amp; more</h1>" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\xff"], ids=["cut", "deep", "bytes"])
def test_the_command_refuses_a_diagnosis_that_is_no_json(calibration, tmp_path, text):
    calibration.save(tmp_path / "calib.npz")
    (tmp_path / "d.json").write_text(text, encoding="latin1")
    with pytest.raises(InvalidInputError, match=r"d\.json` must be a JSON file"):
        run(tmp_path / "calib.npz", "-o", tmp_path / "r.html", "--diagnosis", tmp_path / "d.json")
    assert not (tmp_path / "r.html").exists()
