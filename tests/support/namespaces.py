"""The four ways in which each core function is called: NumPy, read-only NumPy, JAX, and JAX under jit."""

import contextlib
import functools
import importlib.util
import sys
from dataclasses import dataclass

import numpy as np
import pytest

HAS_JAX = importlib.util.find_spec("jax") is not None


@dataclass(frozen=True)
class Namespace:
    """Makes arrays of one library, and calls functions on them."""

    name: str
    is_jax: bool = False
    is_traced: bool = False
    is_read_only: bool = False

    def asarray(self, values, dtype=None):
        """Return a copy of `values` with the same dtype. 64-bit types stay 64-bit on JAX too."""
        array = np.array(values, dtype=dtype)
        if self.is_jax:
            with enable_x64():
                return _jax().numpy.asarray(array)
        array.flags.writeable = not self.is_read_only
        return array

    def call(self, function, *arrays, **static):
        """Call ``function(*arrays, **static)``, under jit if this is the jit variant. `static` is not traced."""
        if not self.is_traced:
            return function(*arrays, **static)
        with enable_x64():
            return _jitted(function, tuple((name, value, type(value)) for name, value in static.items()))(*arrays)

    def owns(self, *arrays):
        """Return whether all arrays belong to this library."""
        kind = _jax().Array if self.is_jax else (np.ndarray, np.generic)
        return all(isinstance(array, kind) for array in arrays)


def enable_x64():
    """Return JAX's context manager for 64-bit types, under its old or its new name."""
    if not HAS_JAX:
        return contextlib.nullcontext()
    return (
        _jax().enable_x64(True)
        if hasattr(_jax(), "enable_x64")
        else __import__("jax.experimental").experimental.enable_x64()
    )


def _jax():
    import jax

    return jax


@functools.cache
def _jitted(function, static):
    return _jax().jit(functools.partial(function, **{name: value for name, value, _ in static}))


needs_jax = pytest.mark.skipif(not HAS_JAX, reason="needs jax")

NUMPY = Namespace("numpy")
READ_ONLY = Namespace("read-only")
JAX = Namespace("jax", is_jax=True)
JIT = Namespace("jit", is_jax=True, is_traced=True)


def import_torch():
    """Return torch, or skip the test. Without torch, `import torch` would find the folder tests/torch."""
    pytest.importorskip("torch.nn")
    return sys.modules["torch"]


def params(*namespaces):
    """Return pytest parameters for these namespaces. Those of JAX are skipped if it is not installed."""
    return [pytest.param(xp, id=xp.name, marks=[needs_jax] if xp.is_jax else []) for xp in namespaces]


ALL = params(NUMPY, READ_ONLY, JAX, JIT)
EAGER = params(NUMPY, READ_ONLY, JAX)
