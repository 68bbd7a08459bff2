"""Ways to quantize a network for onnxruntime: klquant's, and those of its peers. Each writes an ONNX file."""

import contextlib
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.version_converter

from klquant import CalibrationWarning
from klquant.backends.onnx import Calibration, Prepared, calibrate, equalize, prepare, quantize, smooth, tune
from tools.bench.real.networks import Loaded

Method = Callable[[Loaded, Path], None]
CRITERIA = ("mse", "max", "percentile", "auto")
JOB = Path(__file__).with_name("nncf_job.py")


class Klquant(NamedTuple):
    """A setting of klquant; a network is observed once for all of its criteria."""

    criterion: str = "entropy"
    guard: bool = True
    asymmetric: bool = True
    batches: bool = False
    step: str = ""

    def __call__(self, network: Loaded, target: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)
            prepared, calibration = observed(network, self.step, self.criterion == "auto")
            if self.criterion != "auto":
                found = calibration.search_thresholds(criterion=self.criterion, guard=self.guard)
                calibration = calibration._replace(thresholds=found)
            batches = network.calibration if self.batches else None
            options = {"batches": batches, "asymmetric": self.asymmetric}
            quantize(prepared, calibration, engine="onnxruntime", **options).save(target)


KNOWN: dict[tuple[Path, str, bool], tuple[Prepared, Calibration]] = {}


def observed(network: Loaded, step: str, auto: bool) -> tuple[Prepared, Calibration]:
    key = network.path, step, auto
    if key not in KNOWN:
        for other in [other for other in KNOWN if other[0] != network.path]:
            del KNOWN[other]
        prepared = prepare(STEPS[step](network))
        KNOWN[key] = prepared, calibrate(prepared, network.calibration, criterion="auto" if auto else "max")
    return KNOWN[key]


STEPS: dict[str, Callable[[Loaded], Any]] = {
    "": lambda network: network.path,
    "equalized": lambda network: equalize(network.path),
    "SmoothQuant": lambda network: smooth(network.path, network.calibration),
}


def tuned(network: Loaded, target: Path) -> None:
    """Tune to the agreement that :func:`klquant.backends.onnx.compare` measures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        tune(network.path, network.calibration, engine="onnxruntime", target=0.999, max_runs=20).quantized.save(target)


def static(options: dict[str, Any], network: Loaded, target: Path) -> None:
    """Quantize by onnxruntime's ``quantize_static``, after the preparation that it recommends."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        feeds = iter(network.calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    source, prepared = upgraded(network.path, target), target.with_suffix(".prepared.onnx")
    with contextlib.redirect_stdout(io.StringIO()):
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(target), Reader(), **options)


def upgraded(path: Path, target: Path) -> Path:
    """The model in opset 13 if it is older: the first with scales per channel."""
    model = onnx.load(path)
    if next(each.version for each in model.opset_import if not each.domain) < 13:
        path = target.with_suffix(".float.onnx")
        onnx.save(onnx.version_converter.convert_version(model, 13), path)
    return path


def nncf(python: str, network: Loaded, target: Path) -> None:
    """Quantize by NNCF's defaults (for transformers those that it has for them), in the Python that has it."""
    data = target.with_suffix(".npz")
    np.savez(data, **{f"{k}/{name}": each for k, feed in enumerate(network.calibration) for name, each in feed.items()})
    command = [
        python,
        JOB,
        upgraded(network.path, target),
        data,
        target,
        *(["transformer"] if network.transformer else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


def klquant_methods() -> dict[str, Method]:
    return {
        "klquant, literal entropy, symmetric": Klquant(guard=False, asymmetric=False),
        "klquant, default": Klquant(),
        **{f"klquant, {name}": Klquant(name) for name in CRITERIA},
        "klquant, with batches": Klquant(batches=True),
        **{f"klquant, {step}": Klquant(step=step) for step in STEPS if step},
        "klquant, SmoothQuant, auto, with batches": Klquant("auto", batches=True, step="SmoothQuant"),
        "klquant, tune": tuned,
    }


def peers(python: str) -> tuple[dict[str, Method], list[str]]:
    """The peers that can be imported, and what is missing."""
    from onnxruntime.quantization import QuantType

    advised = {"activation_type": QuantType.QUInt8, "per_channel": True}
    found = {"quantize_static": partial(static, {}), "quantize_static, per channel": partial(static, advised)}
    known = subprocess.run([python, "-c", "import nncf"], capture_output=True, check=False).returncode == 0
    if known:
        found["NNCF"] = partial(nncf, python)
    where = f"nncf is not in {python}; pass --peers-python PYTHON of an environment with nncf and onnxruntime"
    return found, [] if known else [where]


def this_python() -> str:
    return sys.executable
