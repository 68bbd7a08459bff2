"""Print, for models of torchvision, timm and transformers, how much of them is in INT8 and how well.

``python -m tools.zoo.table [family or model ...] [--onnx]`` in ``tests/``; it needs those packages. ``--onnx`` also
exports each model and compares onnxruntime with the simulation.
"""

import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from klquant.backends.torch import export_onnx, quantize, saturate_like_engines
from klquant.backends.torch.model.calls import Calls
from klquant.backends.torch.model.dataflow import tensors_in
from klquant.backends.torch.model.forward import call_model
from klquant.backends.torch.model.products import Point
from klquant.backends.torch.simulation import QuantizedLayer
from tools.zoo.families import FAMILIES


class _Flops(TorchDispatchMode):
    """Counts multiply-adds, apart in and outside INT8."""

    def __init__(self):
        super().__init__()
        self.inside, self.total, self.depth = 0, 0, 0
        self.left = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula:
            count = formula(*args, **(kwargs or {}), out_val=result)
            self.total += count
            self.inside += count * (self.depth > 0)
            if not self.depth:
                self.left[str(func._overloadpacket)] += count
        return result


def _is_rounded(module):
    """Return whether a layer, or an operand, is in INT8; one that is called several times, in all calls."""
    if isinstance(module, Calls):
        return all(isinstance(module._modules[f"@{k}"], QuantizedLayer) for k in range(module.number))
    return isinstance(module, QuantizedLayer)


@contextmanager
def counted(model):
    """Count the multiply-adds of a simulation during the block."""
    flops, call = _Flops(), Point.call
    handles = []

    def change(step):
        def hook(*_):
            flops.depth += step

        return hook

    def point_call(self, *args):
        inside = all(_is_rounded(tap) for tap in self._modules.values())
        flops.depth += inside
        try:
            return call(self, *args)
        finally:
            flops.depth -= inside

    for layer in model.modules():
        if _is_rounded(layer):
            handles += [layer.register_forward_pre_hook(change(1)), layer.register_forward_hook(change(-1))]
    Point.call = point_call
    try:
        with flops, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield flops
    finally:
        Point.call = call
        for handle in handles:
            handle.remove()


def ready(model):
    """Return the model in eval mode, with statistics of BatchNorm that are no identity, and a head that is not 0."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.any():
            torch.nn.init.normal_(module.weight, std=0.02)
        if isinstance(getattr(module, "running_var", None), torch.Tensor):
            module.running_mean.data.uniform_(-0.1, 0.1)
            module.running_var.data.uniform_(0.5, 1.5)
    return model.eval()


def sqnr(model, simulated, batch):
    """Return the SQNR of all outputs together, in dB."""
    with torch.no_grad():
        expected, got = (
            [y for y in tensors_in(call_model(net, batch)) if y.is_floating_point()] for net in (model, simulated)
        )
    signal = sum(float(y[y.isfinite()].double().square().sum()) for y in expected)
    noise = sum(float((a - b)[a.isfinite()].double().square().sum()) for a, b in zip(expected, got, strict=True))
    return 10 * torch.tensor(signal / max(noise, 1e-30)).log10().item()


def exported(result, batch):
    """Return how the output of onnxruntime agrees with the simulation: SQNR in dB, or why there is none."""
    import onnxruntime

    from klquant.backends.torch.export.trace import named_tensors
    from klquant.backends.torch.model.arguments import arguments_of

    simulation = saturate_like_engines(result.model)
    model = export_onnx(simulation, batch, engine="tensorrt", dynamic_batch=False).model
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {name: x.numpy() for name, x in named_tensors(simulation, arguments_of(simulation, batch)).items()}
    wanted = {node.name for node in session.get_inputs()}
    got = [torch.from_numpy(y) for y in session.run(None, {k: v for k, v in given.items() if k in wanted})]
    with torch.no_grad():
        expected = [y for y in tensors_in(call_model(simulation, batch)) if y.is_floating_point()]
    same = [y for y in got if y.is_floating_point()]
    signal = sum(float(y.double().square().sum()) for y in expected)
    noise = sum(float((a - b).double().square().sum()) for a, b in zip(expected, same, strict=True))
    quantizers = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    return f"{10 * torch.tensor(signal / max(noise, 1e-30)).log10().item():.0f} dB, {quantizers} Q"


def row(name, build, batches, *, onnx):
    """Return one row of the table."""
    torch.manual_seed(0)
    model = ready(build())
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = quantize(model, batches, num_bins=1001, criterion="mse")
        seconds = time.perf_counter() - started
        with counted(result.model) as flops:
            call_model(result.model, batches[0])
        db = sqnr(model, result.model, batches[0])
        try:
            there = exported(result, batches[0]) if onnx else ""
        except Exception as error:
            there = f"{type(error).__name__}: {error}"[:150]
    norms = [fold for fold in result.folds if fold.kind == "batch_norm"]
    folded = sum(not fold.reason for fold in norms)
    left = ", ".join(f"{op.removeprefix('aten.')} {100 * n / flops.total:.1f} %" for op, n in flops.left.most_common(3))
    reasons = Counter(reason for reason in result.skipped.values())
    why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    share = 100 * flops.inside / max(flops.total, 1)
    return (
        f"| {name} | {share:.1f} % | {db:.1f} | {folded} of {len(norms)} | {left} | {why} | {seconds:.1f} s | {there} |"
    )


def main(wanted):
    """Print the table."""
    onnx = "--onnx" in wanted
    wanted = {word for word in wanted if word != "--onnx"}
    columns = ("model", "multiply-adds in INT8", "SQNR dB", "BatchNorms folded", "left", "why", "time", "onnxruntime")
    say(f"| {' | '.join(columns)} |")
    say("|---" * len(columns) + "|")
    for family, models in FAMILIES.items():
        for name, (build, batches) in models().items():
            if not wanted or {family, name} & wanted:
                try:
                    say(row(f"{family}/{name}", build, batches, onnx=onnx))
                except Exception as error:
                    traceback.print_exc(limit=-6)
                    say(f"| {family}/{name} | {type(error).__name__}: {str(error)[:300]} |")


def say(line):
    """Print a line at once, also to a file."""
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
