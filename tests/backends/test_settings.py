import json

import pytest

from klquant.backends.settings import LayerOptions, Settings, matching
from klquant.errors import InvalidInputError

NAMES = ["stem", "block.0.conv", "block.1.conv", "head"]


def test_all_layers_are_chosen_by_default_with_the_general_options():
    options = Settings.make(num_bits=6, observe="outputs").resolve(NAMES)
    assert list(options) == NAMES
    assert set(options.values()) == {LayerOptions(num_bits=6, observe="outputs")}


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        ({"include": "block.*"}, ["block.0.conv", "block.1.conv"]),
        ({"include": ["stem", "head"]}, ["stem", "head"]),
        ({"exclude": "head"}, NAMES[:3]),
        ({"include": "block.*", "exclude": ["*.0.*"]}, ["block.1.conv"]),
        ({"exclude": "*"}, []),
        ({"exclude": "HEAD*", "include": "[sh]*"}, ["stem", "head"]),
    ],
)
def test_patterns_include_and_exclude(settings, chosen):
    assert list(Settings.make(**settings).resolve(NAMES)) == chosen


def test_the_last_override_that_matches_wins_option_by_option():
    overrides = {"block.*": {"criterion": "max", "num_bits": 4}, "*.1.conv": LayerOptions(num_bits=10)}
    options = Settings.make(overrides=overrides).resolve(NAMES)
    assert options["stem"] == LayerOptions(num_bits=8, observe="inputs")
    assert options["block.0.conv"] == LayerOptions("max", 4, "inputs")
    assert options["block.1.conv"] == LayerOptions("max", 10, "inputs")


def test_a_pattern_without_a_layer_is_misspelt():
    for settings in ({"exclude": "heed"}, {"include": "heed"}, {"overrides": {"heed": {"criterion": "max"}}}):
        with pytest.raises(InvalidInputError, match=r"pattern `heed` matches none of 4 layers, such as \['head'"):
            Settings.make(**settings).check_patterns(NAMES)
    Settings.make(exclude="head", overrides={"block.*": {}}).check_patterns(NAMES)


def test_settings_survive_json():
    settings = Settings.make(
        exclude="head", overrides={"block.*": {"threshold": 0.1, "criterion": "mse"}}, num_bins=801
    )
    assert Settings.make(**json.loads(json.dumps(settings.as_json()))) == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_bins": 400}, "`num_bins` must be odd and at least 255, got 400"),
        ({"num_bins": 255.0}, "`num_bins` must be odd"),
        ({"num_bits": 1}, "`num_bits` must be 2 to 16, got 1"),
        ({"num_bits": True}, "`num_bits` must be 2 to 16, got True"),
        ({"observe": "weights"}, "`observe` must be 'inputs' or 'outputs', got 'weights'"),
        ({"num_bins": 10**8 + 1}, "`num_bins` must be at most 65537, got 100000001"),
        ({"include": ["a", 1]}, "patterns must be strings, got 1"),
        ({"max_amax": float("nan")}, "`max_amax` must be positive and finite, got nan"),
        ({"max_amax": float("inf")}, "`max_amax` must be positive and finite, got inf"),
        ({"passes": 3}, "`passes` must be 1 or 2, got 3"),
        ({"passes": 1, "max_amax": 1e9}, "`max_amax` must be at most 43046721 with one pass, got 1000000000.0"),
        ({"exclude": None}, "`exclude` must be a name pattern or several, got None"),
        ({"bins": 3}, r"settings must be among observe, .* got \['bins'\]"),
        ({"num_bin": 301}, r"got \['num_bin'\]; did you mean 'num_bins'\?"),
        ({"criterions": "mse"}, r"got \['criterions'\]; did you mean 'criterion'\?"),
        ({"overrides": {"a": {"criterion": "kl"}}}, "`criterion` of `a` must be one of entropy, .* got 'kl'"),
        ({"overrides": {"a": {"threshold": 0.0}}}, "`threshold` of `a` must be positive and finite, got 0.0"),
        ({"overrides": {"a": {"threshold": 10**400}}}, "`threshold` of `a` must be positive and finite, got 1000"),
        ({"overrides": {"a": {"min_ratio": 2}}}, "`min_ratio` of `a` must be between 0 and 1, got 2"),
        ({"overrides": {"a": {"percentile": 0}}}, "`percentile` of `a` must be above 0 and at most 100, got 0"),
        ({"overrides": {"a": {"bits": 4}}}, r"options of `a` must be among criterion, .* got \['bits'\]"),
        ({"overrides": {"a": 4}}, "options of `a` must be a dict or LayerOptions, got int"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(InvalidInputError, match=message):
        Settings.make(**settings)


def test_a_pattern_that_is_a_name_means_that_name_only():
    names = ["block[0]/fc", "block0/fc", "block1/fc"]
    assert matching(names, ["block[0]/fc"]) == {"block[0]/fc"}
    assert matching(names[1:], ["block[0]/fc"]) == {"block0/fc"}
    assert matching(names, ["block[0-9]/fc"]) == {"block0/fc", "block1/fc"}
    assert matching(names, []) == set()
    options = Settings.make(exclude="block[0]/fc", overrides={"block0/fc": {"num_bits": 4}}).resolve(names)
    assert {name: one.num_bits for name, one in options.items()} == {"block0/fc": 4, "block1/fc": 8}
