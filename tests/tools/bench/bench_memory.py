"""The memory of calibration for few and for many images, compared with onnxruntime.

Run it by
``pytest tests/tools/bench/bench_memory.py -o python_files='bench_*.py'``.
It takes three minutes. The digits are scaled up to 64 x 64 pixels and run through the residual net one by one, because
onnxruntime joins only batches of equal size. Each calibration has its own process. Its row gives the MiB by which it
raised the peak of plain runs, and its CPU time relative to one plain run over the same images. onnxruntime gets fewer
images if it would need more than 6 GiB. klquant must find the same ranges as MinMax on all images. It keeps no
activations but in the row that says so.
``KLQUANT_BENCH_JSON=path`` writes the table to that file too.
"""

from importlib import metadata

import numpy as np
import pytest
from sklearn.datasets import load_digits

from klquant.backends.onnx import Calibration
from support import onnx_networks
from support.calibration_job import Job, measure
from tools.bench.peers import agreement, machine, quantize_static
from tools.bench.peers.table import collected

NETWORK, ZOOM = "residual net", 8
FEW, MANY, LIMIT = 64, 1437, 6 * 1024  # images; MiB
CASES = {
    "klquant, entropy": {"method": "entropy", "options": {"keep_bytes": 0}},
    "klquant, entropy, batches of 32 and 29": {"method": "entropy", "batch": 32, "options": {"keep_bytes": 0}},
    "up to 1 GiB kept: klquant, entropy": {"method": "entropy"},
    "MinMax": {"method": "MinMax"},
    "Entropy": {"method": "Entropy"},
    "Entropy, CalibStridedMinMax of 64": {"method": "Entropy", "options": {"stride": 64}},
}


@pytest.fixture(scope="module")
def report(request):
    versions = {name: metadata.version(name) for name in ("onnx", "onnxruntime")}
    with machine.one_core() as how:
        provenance = {**machine.provenance(cores=how), **versions}
        with collected(request.config.pluginmanager, provenance, title="memory of calibration") as report:
            yield report


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    path, data = folder / "float.onnx", folder / "images.npy"
    model = onnx_networks.load(NETWORK)
    del model.graph.value_info[:]  # it has the shapes for 8 x 8 pixels
    for size in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        size.dim_value *= ZOOM
    quantize_static.preprocess(model, path)
    images = load_digits().data[:MANY].reshape(-1, 1, 8, 8) / 16
    np.save(data, images.astype(np.float32))
    return Job("", str(path), str(data), str(folder / "found.npz"), batch=1, zoom=ZOOM)


def test_memory(report, job):
    found = {}
    for label, fields in CASES.items():
        case = job._replace(**fields)
        few = measure(case._replace(number=FEW))
        add_row(report, f"{label}: {FEW} images", few)
        number = min(MANY, int(LIMIT * FEW / few.extra_mib))  # memory grows at most in proportion
        many = measure(case._replace(number=number))
        note = "" if number == MANY else f"more would take over {LIMIT} MiB"
        wanted = ("<=", 1.1) if label.startswith("klquant") else None
        growth = many.extra_mib / few.extra_mib, f"x {FEW} images", wanted
        add_row(report, f"{label}: {number} images", many, growth, note)
        found[label] = ranges(case)
    for label in ("klquant, entropy, batches of 32 and 29", "MinMax"):
        assert agreement.of_thresholds(found[label], found["klquant, entropy"]) == 100


def ranges(job):
    """Return amax by tensor."""
    peer = job.method in quantize_static.METHODS
    return quantize_static.thresholds(job.result) if peer else Calibration.load(job.result).amax


def add_row(report, row, cost, compared=(), note=""):
    figures = {"MiB": f"{cost.extra_mib:.0f}", "CPU / forward": f"{cost.ratio:.3g}"}
    report.add(row, cost.calibrating, *compared, note=note, figures=figures)
