import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Small tensors are faster on one thread, and far faster where others use the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
