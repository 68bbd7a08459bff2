import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores among them; said before anything starts threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from support.namespaces import ALL, EAGER

collect_ignore = ["tools/mutation"]  # no tests, and it needs libraries of its own


@pytest.fixture(params=ALL)
def xp(request):
    return request.param


@pytest.fixture(params=EAGER)
def eager(request):
    """As `xp`, without jit: where values are concrete, so that they are checked."""
    return request.param
