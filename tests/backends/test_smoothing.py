import numpy as np
import pytest

from klquant.backends.smoothing import Channels, Reader, choose_factors

HIGH = np.array([1.0, 2.0, 4.0, 64.0])
CHANNELS = Channels(np.zeros(4), HIGH, HIGH**2 / 10)
DEPTHWISE = Reader(np.ones((4, 1, 1, 9)), CHANNELS)  # each weight has a scale of its own, so all channels may be alike


@pytest.mark.parametrize(("headroom", "sizes"), [(1, [8, 8, 8, 64]), (4, [8, 8, 16, 64]), (8, [8, 16, 32, 64])])
def test_a_channel_counts_as_larger_but_not_as_the_largest(headroom, sizes):
    factors, ratio = choose_factors([DEPTHWISE], None, headroom)
    np.testing.assert_allclose(factors / factors[-1], np.array(sizes) / 64)
    assert ratio < 1


def test_a_given_alpha_takes_channels_as_they_are():
    factors, _ = choose_factors([DEPTHWISE], 1.0, 4)
    np.testing.assert_allclose(factors / factors[-1], HIGH / 64)


def test_layers_may_read_an_activation_behind_pooling():
    pooled = Reader(np.ones((1, 5, 4, 1)), Channels(np.zeros(4), HIGH[::-1] / 100, HIGH[::-1] ** 2 / 1e5))
    factors, ratio = choose_factors([DEPTHWISE, pooled], None)
    alone, best = choose_factors([DEPTHWISE], None)
    assert best < ratio <= 1
    assert not np.allclose(factors, alone)
