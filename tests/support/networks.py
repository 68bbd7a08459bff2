"""Small networks for the tests of the PyTorch backend, with BatchNorms that are never an identity."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class Net(nn.Module):
    """A network of the given modules, registered in the given order, whose forward is ``run(self, *args)``."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


class Counting:
    """A way to run a model (`forward`) that counts the runs."""

    def __init__(self):
        self.runs = 0

    def __call__(self, model, batch):
        self.runs += 1
        return model(batch)


class Broken(Exception):
    """Raised by a test in the middle of a call."""


def ready(model, *, seed=0, dtype=torch.float64):
    """Return the model in eval mode and `dtype`, with random weights and BatchNorm statistics."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.uniform_(-1, 1, generator=generator)
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        for tensor, low, high in (
            (norm.running_mean, -1, 1),
            (norm.running_var, 0.3, 3),
            (norm.weight, -2, 2),
            (norm.bias, -1, 1),
        ):
            if tensor is not None:
                tensor.data.uniform_(low, high, generator=generator)
    return model.to(dtype).eval()


def exact(model, *, seed=0):
    """Return the model in float32 with weights in eighths. With :func:`eighths` its sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randint(-8, 9, parameter.shape, generator=generator) / 8
    return model.float().eval()


def eighths(*shape, seed=0):
    """Draw a batch of multiples of 1/8."""
    return torch.randint(-40, 41, shape, generator=torch.Generator().manual_seed(seed)) / 8


def batch(*shape, seed=0, dtype=torch.float64):
    """Draw a batch from a normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mlp(dtype=torch.float32):
    """Return a small network with a BatchNorm, a ReLU and two layers, `first` and `second`."""
    parts = {"first": nn.Linear(4, 6), "norm": nn.BatchNorm1d(6), "relu": nn.ReLU(), "second": nn.Linear(6, 3)}
    return ready(Net(_run_mlp, **parts), dtype=dtype)


def _run_mlp(net, x):
    return net.second(net.relu(net.norm(net.first(x))))


def outputs(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs)


def is_same(a, b):
    """Return whether two tensors agree bit for bit."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def fingerprint(model):
    """Return everything about a model that a user could see change, including writes that were undone."""
    state = {}
    for name, module in model.named_modules(remove_duplicate=False):
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        state[name] = (
            id(module),
            type(module),
            module.training,
            sorted(vars(module)),
            num_hooks(module),
            [
                (k, id(t), t.dtype, t.requires_grad, t._version, t.detach().double().numpy().tobytes())
                for k, t in tensors
            ],
        )
    return state
