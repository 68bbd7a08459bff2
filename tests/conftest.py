import pytest
from namespaces import ALL, EAGER


@pytest.fixture(params=ALL)
def xp(request):
    return request.param


@pytest.fixture(params=EAGER)
def eager(request):
    """As `xp`, without jit: where values are concrete, so that they are checked."""
    return request.param
