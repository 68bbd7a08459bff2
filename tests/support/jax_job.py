"""Calibrate over four devices, or in one of several processes of jax.distributed; run as a script.

Arguments: ``sharded FILE``, or ``processes FILE ADDRESS NUMBER RANK``. The file gets the histograms.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script

import json
from contextlib import nullcontext

import jax
import numpy as np

from klquant.backends.jax import JaxProcesses, calibrate, quantize
from support.jax_networks import loops, loops_params, random_batches

BATCHES = random_batches(16, 16, 8)
OPTIONS = {"num_bins": 1001, "criterion": "max"}


def described(found):
    return {
        "amax": found.amax,
        "hist": {name: histogram.hist.tolist() for name, histogram in found.histograms.items()},
        "thresholds": {name: layer.threshold for name, layer in found.thresholds.items()},
        "calls": found.calls,
        "num_batches": found.num_batches,
        "skipped": found.skipped,
        "zeros": found.zeros,
    }


def network(params, x):
    """Return what does not depend on the order of sums, but on every activation."""
    return jax.nn.relu(x @ np.eye(16, dtype=np.float32)) @ params["last"]


def outlier():
    """Return a function, its parameters and two batches: the second has an outlier, which matters to the product."""
    batches = [np.random.default_rng(k).standard_normal((256, 16)).astype(np.float32) for k in range(2)]
    batches[1][0, 0] = 60.0
    return lambda w, x: x @ w, np.where(np.arange(16) == 0, 100, 0.1).astype(np.float32)[:, None], batches


def sharded(passes):
    """Return the statistics of batches that are spread over four devices, and how an INT8 result is spread."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    batches = [jax.device_put(x, rows) for x in BATCHES]
    params = jax.device_put(loops_params(), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    int8 = quantize(network, params, batches, passes=passes, **OPTIONS)
    result = int8.function(params, batches[0])
    return {**described(int8.calibration), "devices": len(result.sharding.device_set), "result": result.tolist()}


def explicit(mesh_is_set):
    """Return the statistics where shardings are part of the types."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with jax.set_mesh(mesh) if mesh_is_set else nullcontext():
        batches = [jax.device_put(x, rows) for x in BATCHES]
        int8 = quantize(network, loops_params(), batches, **OPTIONS)
        return {**described(int8.calibration), "result": int8.function(loops_params(), batches[0]).tolist()}


def processes(rank, number):
    shares = {"even": BATCHES[rank::number], "one has all": BATCHES if rank == 1 else []}
    group = JaxProcesses()
    found = {
        name: described(calibrate(loops, loops_params(), batches, process_group=group, **OPTIONS))
        for name, batches in shares.items()
    }
    streamed = calibrate(network, loops_params(), iter(shares["even"]), process_group=group, passes=1, **OPTIONS)
    function, weight, batches = outlier()
    auto = calibrate(function, weight, batches[rank::number], process_group=group, num_bins=1001, criterion="auto")
    try:
        calibrate(network, loops_params(), [np.full((2, 16), np.nan)] if rank else BATCHES, process_group=group)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    return {**found, "one pass": described(streamed), "auto": described(auto), "failure": failure}


if __name__ == "__main__":
    if sys.argv[1] == "sharded":
        result = {"two passes": sharded(2), "one pass": sharded(1), "explicit": explicit(True)}
        result["explicit, no mesh is set"] = explicit(False)
    else:
        address, number, rank = sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
        jax.distributed.initialize(address, number, rank)
        result = processes(rank, number)
    Path(sys.argv[2]).write_text(json.dumps(result))
