import math
import sys
from pathlib import Path

import pytest

import klquant.backends.guard
from klquant.backends.guard import Complaint, overclipped

FINE = {"amax": 2.0, "threshold": 1.5, "clipped": 1e-4, "sqnr_db": 40.0, "alternatives": {"max": 38.0, "mse": 41.0}}


def test_a_threshold_that_clips_little_needs_no_word():
    assert overclipped(**FINE) == Complaint()


def test_a_loss_of_expected_sqnr_names_the_best_criterion():
    message = overclipped(
        **{**FINE, "threshold": 1.25, "sqnr_db": 21.3, "alternatives": {"max": 28.0, "mse": 30.4}}
    ).text
    assert message == ("expected SQNR 21.3 dB at T = 1.25, 9.1 dB below criterion 'mse'")
    assert (
        "9.1 dB below criterion 'max'" in overclipped(**{**FINE, "sqnr_db": 28.9, "alternatives": {"max": 38.0}}).text
    )


@pytest.mark.parametrize(("sqnr_db", "warned"), [(38.0, False), (37.99, True), (50.0, False), (math.nan, False)])
def test_the_limit_is_3_db(sqnr_db, warned):
    assert bool(overclipped(**{**FINE, "sqnr_db": sqnr_db}).text) == warned


@pytest.mark.parametrize(
    ("threshold", "clipped", "warned"),
    [
        (1.0, 0.01, False),
        (0.999, 0.01, True),
        (0.999, 1e-3, False),
        (0.999, 1.01e-3, True),
        (1.5, 0.5, False),
        (1.5, 0.51, True),
    ],
)
def test_the_limits_are_half_of_amax_and_one_in_a_thousand(threshold, clipped, warned):
    assert bool(overclipped(**{**FINE, "threshold": threshold, "clipped": clipped}).text) == warned


def test_clipping_is_described_with_a_remedy_only_where_there_is_one():
    clipping = {**FINE, "threshold": 0.6, "clipped": 0.0125}
    what = "T = 0.6 is 0.30 of amax = 2 and clips 1.25% of the values"
    assert overclipped(**clipping)[:2] == (what, "mse")
    nothing = f"{what}; no other criterion expects a better SQNR here"
    assert overclipped(**{**clipping, "sqnr_db": 41.0})[:2] == (nothing, "")
    unknown = f"{what}; criterion 'mse' may be better"
    assert overclipped(**{**clipping, "alternatives": {}})[:2] == (unknown, "")


def test_both_reasons_are_given():
    message = overclipped(**{**FINE, "threshold": 0.6, "clipped": 0.0125, "sqnr_db": 20.0}).text
    assert message.count(";") == 1
    assert "clips 1.25%" in message
    assert "21.0 dB below" in message


def test_unknown_numbers_are_no_reason():
    nothing = {"amax": 0.0, "threshold": 127.0, "clipped": 0.0, "sqnr_db": math.inf}
    assert overclipped(**nothing, alternatives={"max": math.inf, "mse": math.inf}) == Complaint()
    assert overclipped(**{**FINE, "alternatives": {"max": math.nan}}) == Complaint()
    assert "below criterion 'mse'" in overclipped(**{**FINE, "alternatives": {"max": math.nan, "mse": 60.0}}).text


def test_it_needs_no_framework():
    source = Path(klquant.backends.guard.__file__).read_text(encoding="utf-8")
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert {line.split()[1].partition(".")[0] for line in imports} <= set(sys.stdlib_module_names)
