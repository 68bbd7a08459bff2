"""The search for a recipe, on a model that is only a table of costs."""

import json
import math

import pytest

import klquant
from klquant.backends.accuracy.trial_log import TrialLog
from klquant.backends.accuracy.trials import Measured, Recipe, Target, Trial, best_of
from klquant.backends.accuracy.tuning import Limits, split_options, tune

LAYERS = [f"l{k}" for k in range(16)]


class Model:
    """Noise adds up: of criteria, steps and layers."""

    criteria = ("entropy", "mse")
    steps, last_steps = ("smooth", "bias"), ()

    def __init__(self, costs, criterion=None, step=None):
        self.costs, self.made = costs, []
        self.criterion, self.step = criterion or {}, step or {}

    def measure(self, recipe):
        self.made.append(recipe)
        noise = sum(cost for name, cost in self.costs.items() if name not in recipe.exclude)
        noise *= self.criterion.get(recipe.criterion, 1.0)
        for step in recipe.steps:
            noise *= self.step.get(step, 1.0)
        sqnr_db = -10 * math.log10(noise) if noise else math.inf
        share = 1 - len(recipe.exclude) / len(self.costs)
        return Measured(sqnr_db, min(sqnr_db / 100, 1.0), 2 - share, share)

    def rank(self, recipe, min_int8):
        order = sorted(self.costs, key=lambda name: -self.costs[name])
        return [(name,) for name in order[: int((1 - min_int8) * len(order))]]


def costs(**worst):
    return dict.fromkeys(LAYERS, 1e-5) | worst


def search(model, target, log=None, **limits):
    return tune(model, Target.parse(target), Limits(**limits), log or TrialLog(None, None))


def test_the_first_trial_that_reaches_the_target_is_the_last():
    model = Model(costs())
    found = search(model, "30dB")
    assert model.made == [Recipe()]
    assert found.reached
    assert found.best == found.trials[0]


def test_the_best_criterion_gets_the_steps_that_help():
    found = search(Model(costs(), {"mse": 0.5}, {"smooth": 2.0, "bias": 0.5}), "43dB")
    assert found.best.recipe == Recipe("mse", ("bias",))
    assert [trial.what for trial in found.trials] == [
        "criterion entropy",
        "criterion mse",
        "mse + smooth",
        "mse + bias",
    ]


class Smoothable(Model):
    """After smoothing, clipping is harmful."""

    def measure(self, recipe):
        found = super().measure(recipe)
        gain = 6.0 * (recipe == Recipe("mse", ("smooth",)))
        return found._replace(sqnr_db=found.sqnr_db + gain)


def test_the_criteria_are_tried_again_with_the_steps_that_help():
    found = search(Smoothable(costs(), {"mse": 1.5}, {"smooth": 0.5}), "43dB")
    assert [trial.what for trial in found.trials] == [
        "criterion entropy",
        "criterion mse",
        "entropy + smooth",
        "entropy + smooth + bias",
        "mse + smooth",
    ]
    assert found.reached
    assert found.best.recipe == Recipe("mse", ("smooth",))


def test_last_steps_are_tried_alone_and_on_top_of_the_best():
    model = Model(costs(), {"mse": 0.5}, {"smooth": 2.0, "bias": 0.5, "refine": 0.1})
    model.last_steps = ("refine",)
    found = search(model, "52dB")
    last = [trial.what for trial in found.trials][-3:]
    assert last == ["entropy + bias", "entropy + refine", "mse + bias + refine"]
    assert found.best.recipe == Recipe("mse", ("bias", "refine"))
    assert search(model, "47dB").best.recipe == Recipe("entropy", ("refine",))
    assert "refine" not in str(search(model, "43dB"))


class BestAlone(Model):
    """The last step is harmful on top of others."""

    def measure(self, recipe):
        found = super().measure(recipe)
        return found._replace(sqnr_db=found.sqnr_db - 9 * (recipe.steps == ("bias", "refine")))


def test_layers_are_left_out_without_the_last_steps():
    model = BestAlone(costs(l3=1e-1, l5=1e-2), {"mse": 0.5}, {"smooth": 2.0, "bias": 0.5, "refine": 0.2})
    model.last_steps, ranked = ("refine",), []
    model.rank = lambda recipe, min_int8: ranked.append(recipe) or [("l3",), ("l5",)]
    found = search(model, "40dB")
    assert ranked == [Recipe("mse", ("bias",))]
    assert {trial.recipe.steps for trial in found.trials if trial.recipe.exclude} == {("bias",)}
    assert found.best.recipe == Recipe("mse", ("bias",), ("l3", "l5"))


def test_as_few_layers_as_needed_are_left_out():
    model = Model(costs(l3=1e-1, l5=1e-2, l9=1e-2))
    found = search(model, "37dB", min_int8=0.5)
    assert set(found.best.recipe.exclude) == {"l3", "l5", "l9"}
    assert found.reached


def test_what_was_left_out_in_vain_is_put_back():
    model = Model(costs(l3=1e-1))
    model.rank = lambda recipe, min_int8: [(f"l{k}",) for k in range(5)]  # a poor ranking
    found = search(model, "37dB")
    assert found.best.recipe.exclude == ("l3",)


def test_the_share_of_int8_is_a_limit():
    found = search(Model(costs(l3=1e-1, l5=1e-2, l9=1e-2)), "37dB", min_int8=0.9)
    assert not found.reached
    assert found.best.recipe.exclude == ("l3",)
    assert "not reached" in str(found)


def test_the_runs_are_bounded():
    model = Model(costs(l3=1e-1, l5=1e-2, l9=1e-2))
    found = search(model, "60dB", max_runs=6, min_int8=0.0)
    assert len(model.made) == len(found.trials) == 6


def test_a_metric_that_is_no_number_is_the_worst():
    trials = [Trial(name, Recipe(name), Measured(math.nan, value, 1.0, 1.0)) for name, value in
              (("a", math.nan), ("b", 0.1))]  # fmt: skip
    assert best_of(trials, Target(0.9, False)).what == "b"


def test_among_those_that_reach_the_target_the_one_with_most_int8_is_chosen():
    trials = [Trial(str(k), Recipe(exclude=("x",) * k), Measured(40.0 + k, 1.0, 1.0, 1 - k / 9)) for k in (2, 1, 3)]
    assert best_of(trials, Target(30.0, True)).what == "1"


# --- targets, limits, records ---


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ("30dB", (30.0, True)),
        (" 22.5 db", (22.5, True)),
        ("0.99", (0.99, False)),
        (0.9, (0.9, False)),
        (1, (1.0, False)),
    ],
)
def test_targets(given, target):
    assert Target.parse(given) == target
    assert Target.parse(str(Target.parse(given))) == target


@pytest.mark.parametrize("given", ["30 decibels", "", "nan", math.inf, None, "dB"])
def test_what_is_no_target_is_refused(given):
    with pytest.raises(klquant.InvalidInputError, match="`target` must be an SQNR such as '30dB'"):
        Target.parse(given)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_runs": 0}, "`max_runs` must be at least 1"), ({"max_runs": 2.5}, "`max_runs`"),
     ({"min_int8": 1.5}, "between 0 and 1"), ({"min_int8": math.nan}, "between 0 and 1")],
)  # fmt: skip
def test_limits_are_checked(options, message):
    with pytest.raises(klquant.InvalidInputError, match=message):
        split_options(options)


def test_options_are_limits_and_settings():
    assert split_options({"max_runs": 3, "num_bins": 255}) == (Limits(3), {"num_bins": 255})


def test_the_trace_is_a_table_and_json():
    found = search(Model(costs(l3=1e-1)), "37dB")
    content = json.loads(found.as_json(), parse_constant=pytest.fail)
    assert content["target"] == "37dB"
    assert content["reached"]
    assert content["best"]["exclude"] == ["l3"]
    assert len(content["trials"]) == len(found.trials) == len(found.rows())
    assert [row[0] for row in found.rows() if row[0].startswith("*")] == ["* 1 of the worst left out"]
    assert found.rows()[0][2] == "+0.0"
    assert "<td" in found._repr_html_()


# --- resume ---


def test_a_tuning_that_was_cut_off_makes_no_trial_twice(tmp_path):
    path = tmp_path / "trials.json"
    whole = search(Model(costs(l3=1e-1, l5=1e-2)), "38dB")
    cut_off, resumed = Model(costs(l3=1e-1, l5=1e-2)), Model(costs(l3=1e-1, l5=1e-2))
    search(cut_off, "38dB", TrialLog(path, "a"), max_runs=3)
    assert search(resumed, "38dB", TrialLog(path, "a")) == whole
    assert cut_off.made + resumed.made == [trial.recipe for trial in whole.trials]
    assert [file.name for file in tmp_path.iterdir()] == ["trials.json"]


def test_the_file_of_another_tuning_is_refused(tmp_path):
    path = tmp_path / "trials.json"
    TrialLog(path, "a").add(Trial("x", Recipe(), Measured(math.nan, math.inf, 1.0, 1.0)))
    assert json.loads(path.read_text(), parse_constant=pytest.fail)["trials"][0]["metric"] is None
    with pytest.raises(klquant.InvalidInputError, match="must come from a tuning of this model, data and options"):
        TrialLog(path, "b")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "klquant tuning", "schema": 1, "trials": [{}]}', "\xff"])
def test_a_damaged_file_is_refused(tmp_path, text):
    path = tmp_path / "trials.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(klquant.InvalidInputError, match="must be a tuning file of klquant"):
        TrialLog(path, "a")
    assert path.read_text(encoding="latin-1") == text
