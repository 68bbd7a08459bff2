"""Copies of observed tensors, in whose memory nobody else writes."""

import pytest
import torch

from klquant.backends.torch.observation.copies import Copies


def bits(tensor):
    """Return the bits of a tensor, NaN included."""
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 4), (3, 1 << 10, 1 << 10)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_copy_keeps_the_values_that_were_observed(dtype, shape, transposed):
    tensor = torch.randn(shape).to(dtype).mT if transposed and len(shape) > 1 else torch.randn(shape).to(dtype)
    observed = tensor.clone()
    copies = Copies(room=1 << 30)
    copies.add("layer", tensor)
    tensor.zero_()
    [(name, kept)] = copies.kept().tensors
    assert (name, kept.dtype, kept.shape) == ("layer", dtype, shape if not transposed else tensor.shape)
    assert torch.equal(bits(kept), bits(observed))
    assert copies.kept().num_bytes == observed.nbytes
