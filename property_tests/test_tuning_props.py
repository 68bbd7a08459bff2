"""Tuning, whatever the measurements are: bounded, never worse than its start, resumable."""

import math

from hypothesis import given
from hypothesis import strategies as st

from klquant.backends.accuracy.trial_log import TrialLog
from klquant.backends.accuracy.trials import Measured, Target
from klquant.backends.accuracy.tuning import Limits, tune

LAYERS = [f"layer{k}" for k in range(12)]
numbers = st.one_of(st.floats(-20, 80), st.just(math.nan), st.just(math.inf), st.just(-math.inf))


class Model:
    """Measures whatever hypothesis draws, without any order in it."""

    criteria, steps, last_steps = ("entropy", "mse", "auto"), ("smooth", "bias"), ("refine",)

    def __init__(self, data, ranking):
        self._data, self._ranking, self.measured = data, ranking, {}

    def measure(self, recipe):
        assert recipe not in self.measured
        share = 1 - len(recipe.exclude) / len(LAYERS)
        drawn = Measured(self._data.draw(numbers), self._data.draw(numbers), 1.0, share)
        return self.measured.setdefault(recipe, drawn)

    def rank(self, recipe, min_int8):
        return [(name,) for name in self._ranking[: int(len(LAYERS) * (1 - min_int8))]]


@given(
    data=st.data(),
    ranking=st.permutations(LAYERS),
    target=st.builds(Target, st.floats(-10, 70), st.booleans()),
    limits=st.builds(Limits, st.integers(1, 40), st.sampled_from([0.0, 0.5, 0.8, 1.0])),
)
def test_it_is_bounded_and_never_worse_than_its_start(data, ranking, target, limits):
    found = tune(Model(data, ranking), target, limits, TrialLog(None, None))
    assert 1 <= len(found.trials) <= limits.max_runs
    assert found.best in found.trials
    assert found.best.value(target) >= found.trials[0].value(target) or found.reached
    assert found.best.value(target) >= min(found.trials[0].value(target), target.value)
    assert found.best.measured.int8_share >= limits.min_int8
    if not found.reached:
        assert all(found.best.rank(target) >= trial.rank(target) for trial in found.trials)
