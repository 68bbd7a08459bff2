import os
from importlib.util import find_spec

import numpy as np
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; set before a library starts threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from support.namespaces import ALL, EAGER

collect_ignore = ["tools/mutation", "support/sharding_job.py"]  # without tests, but with needs or effects of their own
if find_spec("jax") is None:  # as in CI's step for the lowest versions of everything else
    collect_ignore += ["jax_backend", "support/jax_job.py", "support/jax_networks.py"]
    collect_ignore += ["tools/bench/jax_models.py", "tools/bench/real/onnx_in_jax.py"]
if find_spec("torchao") is None:
    collect_ignore.append("torch/test_pt2e.py")

STATES: dict[tuple[str, str], dict] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Rewind the generators of the test's module, so that the values of a test do not depend on what ran before it."""
    module = getattr(item, "module", None)
    for name, value in vars(module).items() if module else ():
        if isinstance(value, np.random.Generator):
            bits = value.bit_generator
            bits.state = STATES.setdefault((module.__name__, name), bits.state)


@pytest.fixture(params=ALL)
def xp(request):
    return request.param


@pytest.fixture(params=EAGER)
def eager(request):
    """As `xp`, but without jit: values are concrete, so klquant checks them."""
    return request.param
