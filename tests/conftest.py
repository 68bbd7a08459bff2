import os
from importlib.util import find_spec

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


@pytest.fixture(params=ALL)
def xp(request):
    return request.param


@pytest.fixture(params=EAGER)
def eager(request):
    """As `xp`, but without jit: values are concrete, so klquant checks them."""
    return request.param
