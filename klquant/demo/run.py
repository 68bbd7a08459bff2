"""The steps of ``klquant demo``: fold, calibrate on 512 images, quantize, compare with FP32, write files."""

import io
import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import nn

import klquant
from klquant.backends.files import write_atomic
from klquant.backends.text import THRESHOLD_COLUMNS, number, threshold_cells, without_nan
from klquant.backends.torch import Calibration, Diagnosis, LayerThreshold, Quantizer
from klquant.demo.digits import Digits
from klquant.plots import plot_divergence, plot_histogram

NUM_CALIBRATION = 512
BATCH_SIZE = 64
LAYER_COLUMNS = ("layer", *THRESHOLD_COLUMNS[1:-1], "output", "alone")


class Accuracy(NamedTuple):
    """Accuracy of one version of the network on the test images."""

    top1: float
    """Images classified correctly, in percent."""
    sqnr_db: float | None
    """Signal-to-quantization-noise ratio of the logits against FP32, in dB; None for FP32."""


class DemoResult(NamedTuple):
    """All results of the demo; :meth:`as_json` gives the content of ``report.json``."""

    accuracy: dict[str, Accuracy]
    calibration: Calibration
    diagnosis: Diagnosis

    @property
    def layers(self) -> dict[str, LayerThreshold]:
        """Thresholds of the layers by KL divergence."""
        thresholds: dict[str, LayerThreshold] = self.calibration.thresholds
        return thresholds

    def as_json(self) -> str:
        """Return all results as JSON, including the folded modules and the layers in floating point."""
        found = self.calibration
        content = {
            "klquant": klquant.__version__,
            "torch": torch.__version__,
            "observe": found.settings.observe,
            "calibration_images": NUM_CALIBRATION,
            "accuracy": self.accuracy,
            "layers": self.layers,
            "diagnosis": json.loads(self.diagnosis.as_json()),
            "folds": found.transforms["fold"],
            "skipped": found.skipped,
            "calls": found.calls,
        }
        return json.dumps(without_nan(content), indent=2)


def run_demo(network: nn.Module, digits: Digits, *, observe: Literal["inputs", "outputs"] = "inputs") -> DemoResult:
    """Quantize the network with KL and with max thresholds, and evaluate both on the test images."""
    batches = digits.train_images[:NUM_CALIBRATION].split(BATCH_SIZE)
    quantizer = Quantizer(network, observe=observe, progress=True)
    quantizer.fold(batches[0])
    quantizer.quantize_weights()
    quantizer.collect_amax(batches)
    quantizer.collect_histograms(batches)
    logits = _logits(network, digits.test_images)
    accuracy = {"FP32": Accuracy(_top1(logits, digits.test_labels), None)}
    quantizer.search_thresholds(criterion="max")
    accuracy["INT8 max"] = _judge(quantizer.simulate().model, logits, digits)
    quantizer.search_thresholds(criterion="entropy")
    result = quantizer.simulate()
    accuracy["INT8 KL"] = _judge(result.model, logits, digits)
    return DemoResult(accuracy, result.calibration, quantizer.diagnose(batches[:2]))


def write_files(result: DemoResult, folder: Path) -> list[Path]:
    """Write ``report.json``, ``calibration.npz`` and a plot of each layer, and return their paths."""
    paths = [folder / "report.json", folder / "calibration.npz"]
    write_atomic(paths[0], result.as_json().encode())
    result.calibration.save(paths[1])
    for name, histogram in result.calibration.histograms.items():
        paths.append(folder / f"{name}.png")
        write_atomic(paths[-1], plot_layer(name, result.layers[name], histogram))
    return paths


def summarize(result: DemoResult) -> list[tuple[str, ...]]:
    """Return the rows of `LAYER_COLUMNS`."""
    diagnosed = {layer.name: (layer.output_sqnr_db, layer.alone_sqnr_db) for layer in result.diagnosis.layers}
    return [
        (name, *list(threshold_cells(found).values())[1:-1], *(number(sqnr_db, ".1f") for sqnr_db in diagnosed[name]))
        for name, found in result.layers.items()
    ]


def summarize_folds(result: DemoResult) -> list[tuple[str, ...]]:
    """Return the rows of the table of folded modules: name, kind, target, and the reason if it was not folded."""
    folds = result.calibration.transforms["fold"]
    return [(fold["module"], fold["kind"], fold["into"] or "", fold["reason"]) for fold in folds]


def _judge(model: nn.Module, reference: torch.Tensor, digits: Digits) -> Accuracy:
    logits = _logits(model, digits.test_images)
    noise = (logits - reference).square().sum()
    return Accuracy(_top1(logits, digits.test_labels), float(10 * torch.log10(reference.square().sum() / noise)))


def _logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(BATCH_SIZE)])


def _top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return 100.0 * float((logits.argmax(1) == labels).double().mean())


def plot_layer(name: str, layer: LayerThreshold, histogram: klquant.Histogram) -> bytes:
    """Return a PNG of one layer with two panels: its histogram and its divergence."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    figure.suptitle(f"{name}: T = {layer.threshold:.4g}, {layer.threshold / layer.amax:.0%} of amax = {layer.amax:.4g}")
    plot_histogram(*histogram, thresholds={layer.criterion: layer}, ax=upper).set_xlabel("")
    plot_divergence(*histogram, without_zeros=True, ax=lower)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
