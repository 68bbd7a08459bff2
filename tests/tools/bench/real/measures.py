"""What an INT8 model gives: agreement and SQNR on the test part, share of layers in INT8, and time against FP32."""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime

from klquant.backends.onnx import inspect
from tools.bench.real.networks import Loaded, Network

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Row(NamedTuple):
    """One method on one network."""

    network: str
    method: str
    agreement: float = float("nan")
    sqnr_db: float = float("nan")
    int8_share: float = float("nan")
    time_ratio: float = float("nan")
    megabytes: float = float("nan")
    failure: str = ""


def open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def outputs(session: onnxruntime.InferenceSession, network: Loaded) -> list[np.ndarray]:
    """All outputs over the test part, joined along the axis of the batches."""
    runs = [session.run(None, feed) for feed in network.test]
    axes = [0 if each.shape[0] == len(runs[0][0]) or each.ndim == 0 else 1 for each in runs[0]]
    return [np.concatenate(each, axis) for each, axis in zip(zip(*runs, strict=True), axes, strict=True)]


def measure(name: str, label: str, how: Network, network: Loaded, expected: list[np.ndarray], path: Path) -> Row:
    quantized = open_session(path)
    score = how.judge(expected, outputs(quantized, network), network.arrays)
    ratio = time_ratio(open_session(network.path), quantized, network.test[0])
    return Row(name, label, *score, int8_share(path), ratio, path.stat().st_size / 1e6)


def int8_share(path: Path) -> float:
    """Share of Conv, ConvTranspose, Gemm and MatMul that onnxruntime executes in INT8."""
    nodes = [node for node in inspect(onnx.load(path), "onnxruntime") if node.op_type in WEIGHTED]
    return sum(node.int8 for node in nodes) / max(len(nodes), 1)


def time_ratio(
    reference: onnxruntime.InferenceSession, other: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]
) -> float:
    """Median of the ratios of neighbouring runs: both see the same load of the machine."""
    ratios: list[float] = []
    start = time.perf_counter()
    while len(ratios) < 5 or (len(ratios) < 50 and time.perf_counter() - start < 3):
        a = seconds(reference, feed)
        b = seconds(other, feed)
        ratios.append(b / a)
    return float(np.median(ratios[1:]))


def seconds(session: onnxruntime.InferenceSession, feed: dict[str, np.ndarray]) -> float:
    """CPU time of this process in a run on one thread."""
    start = time.thread_time()
    session.run(None, feed)
    return time.thread_time() - start
