"""Trying every way: the order, the time limit, the choice, the verdict and the advice."""

import json
import math
from types import SimpleNamespace

import pytest

from klquant.backends.accuracy.trials import Recipe, Target
from klquant.backends.automatic import COLUMNS, NEXT, Attempt, Automatic, Data, better_than, check_limit, try_all
from klquant.backends.calibration import Calibration
from klquant.backends.settings import Settings
from klquant.errors import InvalidInputError, ModelError

SHARE = Target(0.99, in_db=False)


def attempt(recipe="mse", sqnr_db=30.0, agreement=1.0, **more):
    recipe = Recipe(recipe) if isinstance(recipe, str) else recipe
    return Attempt(recipe, sqnr_db, agreement, *{**COSTS, **more}.values())


COSTS = {"num_bytes": 250_000, "ms": 1.0, "float_ms": 2.0, "int8_share": 1.0}
FULL = Data(8, 100, held_out=True)


class Model:
    criteria, steps, last_steps = ("entropy", "max"), ("smooth", "correct_bias"), ()

    def __init__(self, **sqnr_db):
        self.sqnr_db, self.tried = sqnr_db, []

    def attempt(self, recipe):
        self.tried.append(recipe)
        value = self.sqnr_db[(recipe.steps or (recipe.criterion,))[-1]]
        if value is None:
            raise ModelError("the engine cannot run it")
        return attempt(recipe, value)


def tried(model, **limits):
    return try_all(model, better_than(SHARE, 0.01), SHARE, **{"max_seconds": 60, **limits})


def test_each_step_is_tried_on_top_of_the_best_so_far():
    model = Model(entropy=20.0, max=30.0, smooth=25.0, correct_bias=31.0)
    attempts, best, left_out = tried(model)
    assert [one.what for one in attempts] == ["entropy", "max", "max + smooth", "max + correct_bias"]
    assert best.what == "max + correct_bias"
    assert left_out == ()


@pytest.mark.parametrize(("share", "tried_last"), [(0.95, True), (0.995, False)])
def test_last_steps_are_tried_only_until_the_target_is_reached(share, tried_last):
    model = Model(entropy=20.0, max=30.0, smooth=25.0, correct_bias=31.0, refine=40.0)
    model.last_steps = ("refine",)
    model.attempt = lambda recipe: Model.attempt(model, recipe)._replace(agreement=share)
    attempts, best, left_out = tried(model)
    assert best.what == "max + correct_bias" + " + refine" * tried_last
    assert (len(attempts), left_out) == (4 + tried_last, ())


def test_a_gain_within_the_noise_is_no_reason_for_a_step():
    assert tried(Model(entropy=30.0, max=29.0, smooth=30.1, correct_bias=30.2))[1].what == "entropy"


def test_what_the_engine_cannot_run_is_left_out_except_for_the_first():
    attempts, *_ = tried(Model(entropy=20.0, max=None, smooth=None, correct_bias=25.0))
    assert [one.what for one in attempts] == ["entropy", "entropy + correct_bias"]
    with pytest.raises(ModelError):
        tried(Model(entropy=None, max=20.0, smooth=1.0, correct_bias=1.0))


def test_without_time_only_the_first_way_is_tried():
    attempts, _, left_out = tried(Model(entropy=20.0), max_seconds=-1)
    assert [one.what for one in attempts] == ["entropy"]
    assert left_out == ("max", "smooth", "correct_bias")


@pytest.mark.parametrize(
    ("one", "other", "better"),
    [
        ((20.0, 0.99), (40.0, 0.98), True),  # reaches the target
        ((20.0, 0.97), (40.0, 0.90), True),  # by more than a sample
        ((20.0, 0.955), (40.0, 0.95), False),  # by less: the SQNR decides
        ((math.nan, math.nan), (1.0, 0.1), False),
    ],
)
def test_the_target_comes_first_then_its_value_then_the_sqnr(one, other, better):
    is_better = better_than(SHARE, 0.01)
    first, second = (attempt("mse", *values) for values in (one, other))
    assert is_better(first, second) is better
    assert is_better(second, first) is not better


def test_a_target_in_decibels_is_about_the_sqnr():
    is_better = better_than(Target(30.0, in_db=True), 0.01)
    assert is_better(attempt("mse", 31.0, 0.5), attempt("mse", 29.0, 1.0))


def result(best=None, data=FULL, wrong=(), target=SHARE):
    best = best or attempt()
    calibration, ran = Calibration.of(Settings()), SimpleNamespace(wrong=wrong)
    return Automatic(None, calibration, [best], best, target, "top-1", data, 1_000_000, ran)


def test_the_verdict_has_accuracy_and_costs():
    assert str(result()) == (
        "Accurate enough: with mse, top-1 agreement is 1.0000 and SQNR 30.0 dB on 100 samples that calibration has "
        "not seen (target 0.99); 0.25 instead of 1 MB, 1 instead of 2 ms per batch"
    )
    assert repr(result()) == f"Automatic({result()})"


def test_what_the_engine_computes_wrongly_is_never_accurate_enough():
    found = result(wrong=["a tensor"])
    assert not found.reached
    assert found.verdict.startswith("Do not use this model")
    assert found.advice[0] == "verify"


@pytest.mark.parametrize(
    ("found", "advice"),
    [
        (result(), ["labels"]),
        (result(attempt(agreement=0.9)), ["tune"]),
        (result(attempt(int8_share=0.5)), ["inspect", "labels"]),
        (result(attempt(ms=3.0)), ["slow", "labels"]),
        (result(attempt(ms=math.nan, float_ms=math.nan)), ["labels"]),
        (result(data=Data(2, 16, held_out=False)), ["held-out", "data", "labels"]),
        (result(attempt(agreement=math.nan)), ["tune"]),
    ],
)
def test_the_advice_fits_what_was_found(found, advice):
    assert found.advice == advice
    assert found.next_steps == [NEXT[name] for name in advice]


def test_times_are_scaled_to_one_time_of_the_float_model():
    quiet, busy = attempt("mse", ms=1.0, float_ms=2.0), attempt("max", ms=4000.0, float_ms=10000.0)
    found = result()._replace(attempts=[attempt("entropy"), quiet, busy], best=quiet)
    assert [row[4] for row in found.rows()] == ["2", "1", "1", "0.8"]


def test_it_is_a_table_in_notebooks_and_json_for_programs():
    found = result()
    assert [len(row) for row in found.rows()] == [len(COLUMNS)] * 2
    assert "<td" in found._repr_html_()
    content = json.loads(found.as_json())
    assert content["reached"]
    assert content["attempts"][0]["what"] == "mse"


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_a_limit_that_is_not_positive_is_refused(seconds):
    with pytest.raises(InvalidInputError, match="`max_seconds` must be positive"):
        check_limit(seconds)
