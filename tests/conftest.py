import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; set before a library starts threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from support.namespaces import ALL, EAGER

collect_ignore = ["tools/mutation", "support/sharding_job.py"]  # without tests, but with needs or effects of their own


@pytest.fixture(params=ALL)
def xp(request):
    return request.param


@pytest.fixture(params=EAGER)
def eager(request):
    """As `xp`, but without jit: values are concrete, so klquant checks them."""
    return request.param
