"""Ways to quantize a network for onnxruntime: klquant's, and those of its peers. Each writes an ONNX file."""

import contextlib
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter

from klquant import CalibrationWarning
from klquant.backends.onnx import calibrate, quantize
from tools.bench.real.networks import Loaded

Method = Callable[[Loaded, Path], None]
CRITERIA = ("entropy", "mse", "max", "percentile")
JOB = Path(__file__).with_name("nncf_job.py")


def klquant_of(criterion: str, of_quantize: dict[str, Any], network: Loaded, target: Path) -> None:
    """Calibrate and quantize for onnxruntime."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        calibration = calibrate(network.path, network.calibration, criterion=criterion)
        quantize(network.path, calibration, engine="onnxruntime", **of_quantize).save(target)


def static(options: dict[str, Any], network: Loaded, target: Path) -> None:
    """Quantize by onnxruntime's ``quantize_static``, after the preparation that it recommends."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        feeds = iter(network.calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    prepared = target.with_suffix(".prepared.onnx")
    model = onnx.load(network.path)
    if next(each.version for each in model.opset_import if not each.domain) < 13:  # the first with scales per channel
        model = onnx.version_converter.convert_version(model, 13)
    with contextlib.redirect_stdout(io.StringIO()):
        quant_pre_process(model, str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(target), Reader(), **options)


def nncf(python: str, network: Loaded, target: Path) -> None:
    """Quantize by NNCF's defaults, in the Python that has it."""
    data = target.with_suffix(".npz")
    np.savez(data, **{f"{k}/{name}": each for k, feed in enumerate(network.calibration) for name, each in feed.items()})
    done = subprocess.run([python, JOB, network.path, data, target], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


def klquant_methods() -> dict[str, Method]:
    return {f"klquant {criterion}": partial(klquant_of, criterion, {}) for criterion in CRITERIA}


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
