"""Calibrations for tests of the report: small ones with every special case, and a large one."""

import functools
import warnings

import numpy as np

import klquant
from klquant.backends.calibration import Calibration, Fingerprint
from klquant.backends.report import describe, render_html
from klquant.backends.settings import Settings

HOSTILE = "<script>document.title='owned'</script>&\"'"
DEAD = "always.zero"
OUTLIER = "outlier"


def counts(seed, *, num_bins, amax=4.0, one_sided=False, total=1_000_000):
    """Return the histogram of a Laplace distribution, without drawing its values one by one."""
    edges = klquant.histogram(np.zeros(0), num_bins=num_bins, amax=amax).edges
    density = np.exp(-12 * np.abs(edges[1:] + edges[:-1]) / 2 / amax) * ((edges[1:] > 0) | (not one_sided))
    hist = np.random.default_rng(seed).poisson(total * density / density.sum())
    hist[-1] += 1
    return klquant.Histogram(hist.astype(np.int64), edges)


def calibration(num_tensors=6, *, num_bins=1001, total=100_000, searched=True, **settings):
    """Return a calibration of tensors with increasing amax. Every second one is never negative."""
    names = [f"features.{3 * k}.conv" for k in range(num_tensors)]
    histograms = {
        name: counts(k, num_bins=num_bins, amax=1.0 + k, one_sided=bool(k % 2), total=total)
        for k, name in enumerate(names)
    }
    amax = {name: 1.0 + k for k, name in enumerate(names)}
    found = Calibration.of(Settings.make(num_bins=num_bins, **settings))._replace(
        model={name: Fingerprint(f"Conv2d({k})", f"{k:064x}") for k, name in enumerate(names)},
        amax=amax,
        histograms=histograms,
        calls=dict.fromkeys(names, 1),
        num_batches=8,
        transforms={"fold": [{"module": "bn", "kind": "batch_norm", "into": names[0], "reason": ""}], "equalize": []},
        skipped={"head": "it was never called"},
    )
    return found._replace(thresholds=found.search_thresholds()) if searched else found


def peculiar():
    """Return a calibration with a hostile name, a tensor that is always 0, and one that is clipped too much."""
    found = calibration(6, overrides={OUTLIER: {"criterion": "percentile", "percentile": 95}})
    histograms = {name: counts(seed, num_bins=1001, total=100_000) for name, seed in ((HOSTILE, 7), (OUTLIER, 9))}
    found = found._replace(
        amax={**found.amax, HOSTILE: 4.0, DEAD: 0.0, OUTLIER: 4.0},
        histograms={**found.histograms, **histograms},
        transforms={"fold": [{"module": HOSTILE, "kind": "relu", "into": None, "reason": HOSTILE}]},
        skipped={HOSTILE: HOSTILE},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", klquant.CalibrationWarning)
        return found._replace(thresholds=found.search_thresholds())


def diagnosis(names):
    """Return the JSON of a diagnosis, with null for missing measurements."""
    keys = ("weight_sqnr_db", "activation_sqnr_db", "output_cosine", "output_sqnr_db")
    layers = [
        {"name": name, **dict.fromkeys(keys, 30.5), "alone_sqnr_db": 40.0 + k, "without_sqnr_db": None, "note": HOSTILE}
        for k, name in enumerate(names)
    ]
    return {"model_sqnr_db": 33.25, "model_cosine": 0.999, "layers": layers}


@functools.cache
def big_page():
    """Return the report on 200 tensors of 4001 bins with large counts: 20 tensors, each under ten names."""
    few = describe(calibration(20, num_bins=4001, total=10**9), weight_scales={"": np.linspace(0.01, 0.02, 512)})
    tensors = [tensor._replace(name=f"block.{k}.{tensor.name}") for k in range(10) for tensor in few.tensors]
    names = [tensor.name for tensor in tensors]
    weights = [few.weights[0]._replace(name=name) for name in names]
    return render_html(few._replace(tensors=tensors, weights=weights, diagnosis=diagnosis(names)))
