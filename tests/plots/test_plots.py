"""Plots: what they show, and how they look.

``python tests/plots/test_plots.py`` draws the images in data/ again; look at them afterwards.
"""

import importlib
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.testing.compare import compare_images
from matplotlib.text import Text

import klquant
from klquant.backends.calibration import Calibration
from klquant.backends.settings import Settings
from klquant.backends.thresholds import LayerThreshold
from klquant.plots import plot_divergence, plot_histogram, plot_layers

FOLDER = Path(__file__).parent / "data"
CRITERIA = {
    "entropy": klquant.optimal_threshold,
    "mse": klquant.mse_threshold,
    "percentile": klquant.percentile_threshold,
    "max": klquant.max_threshold,
}


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """Settings of matplotlib are not changed, and no figure stays open."""
    before, figures = dict(matplotlib.rcParams), open_figures()
    yield
    assert dict(matplotlib.rcParams) == before
    assert open_figures() == figures


def open_figures():
    return sys.modules["matplotlib.pyplot"].get_fignums() if "matplotlib.pyplot" in sys.modules else []


def axes(left=0.12, right=0.98, height=3.0):
    """Return Axes at a fixed place: a layout depends on the sizes of texts, and these on the version of matplotlib."""
    return Figure(figsize=(6, height), dpi=100).add_axes((left, 0.15, right - left, 0.7))


def sample(size=20_000, seed=0, num_bins=1001):
    return klquant.histogram(np.random.default_rng(seed).laplace(size=size), num_bins=num_bins)


def some_layers(number):
    rng, criteria = np.random.default_rng(0), ["entropy"] * 4 + ["mse", "max"]
    found = {}
    for k in range(number):
        amax, ratio = rng.lognormal(1), rng.uniform(0.3, 1)
        numbers = (10 ** rng.uniform(-6, -2), rng.uniform(20, 45), criteria[k % 6])
        found[f"features.{k}.conv"] = LayerThreshold(
            amax, amax if numbers[-1] == "max" else amax * ratio, 0.01, *numbers
        )
    return found


ODD = {
    "always 0, a name with $x$": LayerThreshold(0.0, 127.0, math.nan, 0.0, math.inf, "none"),
    "T > amax": LayerThreshold(1.0, 1.25, math.nan, 0.0, math.nan, "fixed"),
    "/model/encoder/layer.0/attention/self/query/MatMul_output_0": LayerThreshold(1e-6, 2e-7, 0.1, 2e-7, -3.0),
}


def draw_histogram():
    hist, edges = sample()
    found = {name: search(hist, edges) for name, search in CRITERIA.items()}
    return plot_histogram(hist, edges, thresholds={**found, "fixed": 3.3}, ax=axes())


def draw_one_sided():
    relu = np.maximum(np.random.default_rng(0).normal(size=20_000), 0)
    return plot_histogram(*klquant.histogram(relu, num_bins=255), log=False, thresholds={"a $x$": 1.0}, ax=axes())


def draw_divergence():
    return plot_divergence(*sample(100, seed=1, num_bins=401), num_quantized_bins=15, eps=0.3, ax=axes())


def draw_layers():
    return plot_layers({**some_layers(9), **ODD}, ax=axes(0.35, 0.58))


def draw_many_layers():
    return plot_layers(some_layers(200), sort="sqnr_db", ax=axes(0.15, 0.65, height=4))


IMAGES = {
    "histogram": draw_histogram,
    "one_sided": draw_one_sided,
    "divergence": draw_divergence,
    "layers": draw_layers,
    "many_layers": draw_many_layers,
}


def save(name, folder):
    """Draw an image without texts and legends: letters differ between versions, and other tests read them."""
    with matplotlib.style.context("default"):
        figure = IMAGES[name]().figure
        figure.draw_without_rendering()
        for artist in figure.findobj(lambda artist: isinstance(artist, (Text, Legend))):
            artist.set_visible(False)
        figure.savefig(folder / f"{name}.png")


@pytest.mark.parametrize("name", IMAGES)
def test_it_looks_as_it_did(name, tmp_path):
    save(name, tmp_path)
    assert compare_images(FOLDER / f"{name}.png", tmp_path / f"{name}.png", tol=1.0) is None


def counts_and_edges(ax):
    return ax.patches[0].get_data()[:2]


def vertical_lines(ax):
    return sorted(float(line.get_xdata()[0]) for line in ax.lines if len(line.get_xdata()) == 2)


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def row_labels(ax):
    """Return the texts at the left and at the right of the rows."""
    axes = (ax, *ax.child_axes)
    return [[label.get_text() for label in each.get_yticklabels()] for each in axes]


def histogram_of(eager):
    return [eager.asarray(array) for array in sample()]


def test_every_plot_returns_the_axes_that_it_was_given(eager):
    given = Figure().subplots(3)
    assert plot_histogram(*histogram_of(eager), ax=given[0]) is given[0]
    assert plot_divergence(*histogram_of(eager), ax=given[1]) is given[1]
    assert plot_layers(ODD, ax=given[2]) is given[2]


def test_given_axes_need_no_pyplot():
    code = """
import sys, numpy as np
from matplotlib.figure import Figure
from klquant.backends.thresholds import LayerThreshold
from klquant.plots import plot_divergence, plot_histogram, plot_layers
hist, edges, axes = np.ones(301), np.linspace(-1, 1, 302), Figure().subplots(3)
plot_histogram(hist, edges, ax=axes[0]), plot_divergence(hist, edges, ax=axes[1])
plot_layers({"fc": LayerThreshold(1.0, 1.0, 0.0, 0.0)}, ax=axes[2])
print("matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_without_axes_there_is_a_new_figure_that_notebooks_show(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    from matplotlib import pyplot

    (hist, edges), before = sample(), open_figures()
    try:
        drawn = [plot_histogram(hist, edges), plot_divergence(hist, edges), plot_layers(some_layers(200))]
        assert [pyplot.figure(number).axes[0] for number in open_figures() if number not in before] == drawn
        assert drawn[2].figure.get_figheight() > 30
    finally:
        for number in {*open_figures()} - {*before}:
            pyplot.close(number)


def test_bad_input_makes_no_figure():
    for function, given in [(plot_histogram, ([1], [2])), (plot_divergence, ([1], [2])), (plot_layers, ({},))]:
        with pytest.raises(klquant.KLQuantError):
            function(*given)  # the fixture looks for figures


def test_the_histogram_is_drawn_bin_by_bin(eager):
    hist, edges = histogram_of(eager)
    drawn = counts_and_edges(plot_histogram(hist, edges, ax=axes()))
    assert all(np.array_equal(shown, given) for shown, given in zip(drawn, (hist, edges), strict=True))


def test_each_threshold_is_marked_on_both_sides_in_a_style_of_its_own(eager):
    hist, edges = histogram_of(eager)
    best = klquant.Threshold(*map(eager.asarray, vars(klquant.optimal_threshold(*sample())).values()))
    found = {"entropy": best, "layer": ODD["T > amax"], "a": 3.0, "b": np.float32(4)}
    ax = plot_histogram(hist, edges, thresholds=found, ax=axes())
    values = [float(best), 1.25, 3.0, 4.0]
    assert vertical_lines(ax) == pytest.approx(sorted([*values, *(-value for value in values)]))
    assert len({line.get_color() for line in ax.lines}) == 4
    assert legend(ax) == [
        f"{float(best):.4g} (entropy), {100 * float(best.clipped):.3g}%",
        "1.25 (layer), 0%",
        "3 (a)",
        "4 (b)",
    ]


def test_a_criterion_has_the_same_colour_in_every_plot():
    hist, edges = sample()
    lines = plot_histogram(hist, edges, thresholds={"x": 1.0, "mse": 2.0, "max": 3.0}, ax=axes()).lines
    bars = plot_layers({name: LayerThreshold(1, 1, 0, 0, 0, name) for name in ("max", "mse")}, ax=axes()).patches
    assert [to_rgb(bar.get_facecolor()) for bar in bars] == [to_rgb(lines[k].get_color()) for k in (4, 2)]
    assert to_rgb(lines[0].get_color()) not in [to_rgb(bar.get_facecolor()) for bar in bars]


def test_what_is_never_negative_is_drawn_from_its_zeros_on():
    hist, edges = sample()
    hist = np.where(edges[1:] < 0, 0, hist)
    ax = plot_histogram(hist, edges, thresholds={"entropy": 2.0}, ax=axes())
    counts, bounds = counts_and_edges(ax)
    assert counts.sum() == hist.sum()
    assert bounds[0] == edges[len(hist) // 2] < 0
    assert vertical_lines(ax) == [2.0]


def test_a_single_count_can_be_seen_on_the_logarithmic_axis():
    hist, edges = sample()
    assert plot_histogram(hist, edges, ax=axes()).get_ylim()[0] == 0.5
    assert plot_histogram(hist / 1000, edges, ax=axes()).get_ylim()[0] == 0.0005
    assert plot_histogram(hist, edges, log=False, ax=axes()).get_yscale() == "linear"
    empty = plot_histogram(np.zeros_like(hist), edges, ax=axes())
    empty.figure.draw_without_rendering()


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ({"mse": math.nan}, r"`thresholds\['mse'\]` must be positive and finite, got nan"),
        ({"mse": 0.0}, r"`thresholds\['mse'\]` must be positive"),
        ({"mse": np.ones(3)}, r"`thresholds\['mse'\]` must be one number, got shape \(3,\)"),
        (klquant.Threshold(1.0, 0, 0.0, 0.0, 0.0), "`thresholds` must map names to T, got Threshold"),
    ],
)
def test_thresholds_that_are_none_are_named(thresholds, message):
    with pytest.raises(klquant.InvalidInputError, match=message):
        plot_histogram(*sample(), thresholds=thresholds, ax=axes())


@pytest.mark.parametrize("plot", [plot_histogram, plot_divergence])
def test_what_is_no_histogram_is_refused_as_by_the_searches(plot):
    hist, edges = sample()
    with pytest.raises(klquant.ArrayTypeError, match="`hist` must be a NumPy or JAX array, got list"):
        plot(hist.tolist(), edges, ax=axes())
    with pytest.raises(klquant.InvalidInputError, match="`hist` must have an odd number of bins, got 1000"):
        plot(hist[1:], edges, ax=axes())
    with pytest.raises(klquant.InvalidInputError, match=r"one histogram, got a batch of shape \(2, 1001\)"):
        plot(np.stack([hist, hist]), edges, ax=axes())
    with pytest.raises(klquant.InvalidInputError, match="`ax` must be matplotlib Axes, got Figure"):
        plot(hist, edges, ax=Figure())


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("without_zeros", [True, False])
def test_the_curve_is_that_of_the_search_and_its_minimum_is_marked(eager, log, without_zeros):
    hist, edges = sample()
    hist[500] += 10_000
    options = {"num_quantized_bins": 127, "eps": 1e-3, "one_sided": True}
    given = [eager.asarray(array) for array in (hist, edges)]
    ax = plot_divergence(*given, without_zeros=without_zeros, log=log, ax=axes(), **options)
    hist[500] *= not without_zeros
    curve, best = klquant.divergence_curve(hist, edges, **options), klquant.optimal_threshold(hist, edges, **options)
    assert np.array_equal(ax.lines[0].get_xdata(), edges[-len(curve) :])
    assert np.array_equal(ax.lines[0].get_ydata(), curve)
    assert vertical_lines(ax) == [float(best)]
    assert (ax.lines[2].get_xdata()[0], ax.lines[2].get_ydata()[0]) == (best.value, best.divergence)
    assert legend(ax) == [f"{best.divergence:.3g} nats at T = {best.value:.4g}"]
    assert ax.get_yscale() == ("log" if log else "linear")


def test_infeasible_candidates_are_gaps_and_a_lone_candidate_is_a_dot():
    line = draw_divergence().lines[0]
    hist, edges = sample(100, seed=1, num_bins=401)
    feasible = np.isfinite(klquant.divergence_curve(hist, edges, num_quantized_bins=15, eps=0.3))
    assert 0 < feasible.mean() < 1
    assert np.array_equal(np.isnan(line.get_ydata()), ~feasible)
    assert [feasible[k - 1 : k + 2].tolist() for k in line.get_markevery()] == [[False, True, False]]


def test_a_divergence_of_zero_is_drawn_at_the_bottom():
    hist, edges = np.zeros(301, int), np.linspace(-1, 1, 302)
    hist[150] = 1000
    ax = plot_divergence(hist, edges, ax=axes())
    assert set(ax.lines[0].get_ydata().tolist()) == {1e-9}
    assert legend(ax) == [f"0 nats at T = {edges[-24]:.4g}"]


def test_nothing_feasible_is_an_error():
    with pytest.raises(klquant.InfeasibleError, match="feasible candidate"):
        plot_divergence(np.zeros(301), np.linspace(-1, 1, 302), ax=axes())


def test_every_layer_has_a_bar_and_its_numbers():
    ax = plot_layers(ODD, ax=axes())
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([math.nan, 1.25, 0.2], nan_ok=True)
    assert ax.get_xlim() == (0, 1.25)
    assert ax.get_ylim() == (2.5, -0.5)  # the first is the uppermost
    names, numbers = row_labels(ax)
    assert names == [
        "always 0, a name with $x$",
        "T > amax",
        "/model/encode\N{HORIZONTAL ELLIPSIS}n/self/query/MatMul_output_0",
    ]
    assert [text.split() for text in numbers] == [
        ["0", "127", "0%", "\N{INFINITY}"],
        ["1", "1.25", "0%", "\N{EN DASH}"],
        ["1e-06", "2e-07", "2e-05%", "-3.0"],
    ]
    assert legend(ax) == ["none", "fixed", "entropy"]


def test_the_numbers_of_all_layers_stand_in_columns():
    layers = {**some_layers(50), **ODD, "max": LayerThreshold(1.2345e-17, 1.2345e-17, 0.0, 1.0, -100.04)}
    texts = row_labels(plot_layers(layers, ax=axes(height=30)))[1]
    assert {len(text) for text in texts} == {38}


def test_of_one_criterion_there_is_no_legend():
    assert plot_layers(some_layers(3), ax=axes()).get_legend() is None


@pytest.mark.parametrize(
    ("sort", "expected"),
    [("model", "abcd"), ("ratio", "bdac"), ("clipped", "dabc"), ("sqnr_db", "badc")],
)
def test_layers_are_sorted_with_the_worst_first(sort, expected):
    layers = {
        "a": LayerThreshold(1.0, 0.9, 0.0, 0.2, 30.0),
        "b": LayerThreshold(1.0, 0.5, 0.0, 0.1, 20.0),
        "c": LayerThreshold(0.0, 1.0, 0.0, 0.0, math.nan),
        "d": LayerThreshold(1.0, 0.7, 0.0, 0.3, 40.0),
    }
    ax = plot_layers(layers, sort=sort, ax=axes())
    assert "".join(row_labels(ax)[0]) == expected
    assert ax.patches[expected.index("d")].get_width() == 0.7


def test_names_that_would_overlap_are_left_out():
    rows = [len(row_labels(plot_layers(some_layers(200), ax=axes(height=height)))[0]) for height in (3, 6, 40)]
    assert rows[0] < rows[1] < rows[2] == 200
    assert rows[0] >= 200 * rows[1] / 400 - 5  # twice the height, twice the names


def test_a_calibration_and_what_has_thresholds_are_taken_as_well():
    layers = some_layers(4)
    calibration = Calibration.of(Settings())._replace(thresholds=layers)
    expected = row_labels(plot_layers(layers, ax=axes()))
    assert row_labels(plot_layers(calibration, ax=axes())) == expected
    with pytest.raises(
        klquant.InvalidInputError, match=r"must have at least one layer, got none; call search_thresholds\(\) first"
    ):
        plot_layers(Calibration.of(Settings()), ax=axes())


def test_thresholds_of_the_core_are_drawn_as_t():
    hist, edges = klquant.histogram(np.random.default_rng(0).normal(size=10_000), num_bins=401)
    found = {"a": klquant.optimal_threshold(hist, edges), "b": klquant.max_threshold(hist, edges)}
    ax = plot_layers(found, ax=Figure().subplots())
    assert [bar.get_width() for bar in ax.patches] == [float(found["a"]), float(found["b"])]
    assert ax.get_xlabel() == "T"


@pytest.mark.parametrize(
    ("thresholds", "sort", "message"),
    [
        ({"fc": 1.5}, "model", r"`thresholds\['fc'\]` must be a LayerThreshold or the Threshold of .* got float"),
        ([1.5], "model", "`thresholds` must be a Calibration or a mapping, got list"),
        (ODD, "amax", "`sort` must be one of model, ratio, clipped, sqnr_db, got 'amax'"),
    ],
)
def test_what_are_no_layers_is_named(thresholds, sort, message):
    with pytest.raises(klquant.InvalidInputError, match=message):
        plot_layers(thresholds, sort=sort, ax=axes())


def test_names_are_no_formulae():
    ax = plot_layers({"$\\bad{$": ODD["T > amax"]}, ax=axes())
    ax.figure.draw_without_rendering()
    ax = plot_histogram(*sample(), thresholds={"$\\bad{$": 1.0}, ax=axes())
    ax.figure.draw_without_rendering()
    assert legend(ax) == ["1 ($\\bad{$)"]


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "klquant.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(klquant.MissingDependencyError, match=r"pip install 'klquant\[plots\]'"):
        importlib.import_module("klquant.plots")


if __name__ == "__main__":
    for name in IMAGES:
        save(name, FOLDER)
