"""One of several processes that calibrate together. torchrun starts them: see torch/test_distributed.py.

Arguments: a folder for the results, and a JSON list of tasks with the number of batches of each process.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script

import json

import numpy as np
import torch
from torch import distributed, nn

import klquant
from klquant.backends import onnx
from klquant.backends.torch import quantize
from support.networks import eighths, exact
from support.onnx_models import build


def network():
    """Return a network whose sums are exact, so that they do not depend on how the data are split."""
    parts = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 5)]
    return exact(nn.Sequential(*parts))


def batches():
    """Return six batches. The values of the first are much smaller than those of the others."""
    return [eighths(8, 1, 8, 8, seed=k) / (1 if k else 8) for k in range(6)]


def onnx_model():
    """Return an ONNX model whose sums are exact too."""
    weights = {"w": np.arange(-18, 18, dtype=np.float32).reshape(4, 1, 3, 3) / 8, "v": np.eye(4, dtype=np.float32)}
    body = "c = Conv(x, w) r = Relu(c) g = ReduceMax <keepdims = 0, axes = [2, 3]> (r) y = MatMul(g, v)"
    return build("float[n, 1, 8, 8] x", "float y", body, **weights)


def calibrate(mine, what, folder):
    """Calibrate one model together with the other processes."""
    if what.startswith("ONNX"):
        return calibrate_onnx(mine, what.removeprefix("ONNX, "), folder)
    options = {"resume": folder / "progress"} if what == "resume" else {"passes": 1 if what == "one pass" else 2}
    criterion = "auto" if what == "auto" else "entropy"
    group = distributed.group.WORLD
    return quantize(network(), mine, criterion=criterion, process_group=group, num_bins=801, **options).calibration


def calibrate_onnx(mine, what, folder):
    options = {"resume": folder / "progress-onnx"} if what == "resume" else {"passes": 1 if what == "one pass" else 2}
    data = [batch.numpy() for batch in mine]
    return onnx.calibrate(onnx_model(), data, process_group=distributed.group.WORLD, num_bins=801, **options)


def main(folder, tasks):
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    for number, (what, shares) in enumerate(tasks):
        begin = sum(shares[:rank])
        mine = batches()[begin : begin + shares[rank]]
        if what == "a process fails" and rank == 1:
            mine[-1][0, 0, 0, 0] = float("nan")
        try:
            calibrate(mine, what, folder).save(folder / f"{number}.{rank}.npz")
        except klquant.KLQuantError as error:
            (folder / f"{number}.{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
