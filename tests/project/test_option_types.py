"""A misspelt option, or one of another type, is an error for mypy, and the right ones are none."""

import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

import klquant
import klquant.backends
from klquant.backends.settings import LayerOptions, LayerOptionsDict, Settings, SettingsOptions

HEAD = """
from torch import nn
from klquant.backends.settings import LayerOptions, Settings
from klquant.backends.torch import Calibration, Quantizer, quantize
def use(model: nn.Module, found: Calibration) -> None:
    """
RIGHT = [
    "quantize(model, [], num_bins=4001, observe='outputs', exclude='head', include=['*'], passes=1, max_amax=2.5)",
    "quantize(model, [], overrides={'a': {'criterion': 'max', 'num_bits': 4}, 'b': LayerOptions(threshold=1.0)})",
    "quantize(model, [], forward=lambda net, x: net(x), progress=True, resume='a.npz', checkpoint_seconds=1)",
    "Quantizer(model, forward=lambda net, x: net(x), num_bits=8)",
    "Quantizer.from_calibration(model, found, progress=True)",
    "Settings.make(exclude=['head'])",
]
WRONG = {
    "quantize(model, [], num_bin=4001)": 'Unexpected keyword argument "num_bin" for "quantize"; did you mean',
    "quantize(model, [], resum='a.npz')": 'Unexpected keyword argument "resum"',
    "quantize(model, [], num_bins='4001')": 'Argument "num_bins" to "quantize" has incompatible type "str"',
    "quantize(model, [], overrides={'a': {'criterio': 'max'}})": "Dict entry 0 has incompatible type",
    "Quantizer(model, foward=print)": 'Unexpected keyword argument "foward"',
    "Quantizer.from_calibration(model, found, num_bins=255)": 'Unexpected keyword argument "num_bins"',
    "Settings.make(exlude='head')": 'Unexpected keyword argument "exlude"',
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Return what mypy says of each line, by its number. Other packages are skipped, which takes most of the time."""
    api = pytest.importorskip("mypy.api")
    folder = tmp_path_factory.mktemp("typed")
    (folder / "klquant").mkdir()  # as in a wheel: in a checkout `backends` lies beside `klquant`
    for path in {*Path(klquant.__file__).parent.iterdir(), *map(Path, klquant.backends.__path__)}:
        (folder / "klquant" / path.name).symlink_to(path)
    (folder / "use.py").write_text(HEAD + "\n    ".join([*RIGHT, *WRONG]))
    (folder / "mypy.ini").write_text(
        f"[mypy]\nmypy_path={folder}\nfollow_imports=silent\n"
        "[mypy-torch.*,numpy.*,rich.*]\nfollow_imports=skip\nignore_missing_imports=True\n"
    )
    options = ["--config-file", str(folder / "mypy.ini"), "--cache-dir", "/dev/null", "--no-error-summary"]
    said, trouble, _ = api.run([*options, str(folder / "use.py")])
    assert not trouble
    found = re.findall(r"use\.py:(\d+): error: (.*)", said)
    return {int(line) - HEAD.count("\n") - 1: message for line, message in found}


def test_right_options_are_no_errors(errors):
    assert {RIGHT[line]: message for line, message in errors.items() if line < len(RIGHT)} == {}


@pytest.mark.parametrize("number", range(len(WRONG)), ids=list(WRONG))
def test_wrong_options_are_errors(number, errors):
    assert list(WRONG.values())[number] in errors.get(len(RIGHT) + number, "")


def test_options_are_those_of_the_settings():
    assert get_type_hints(LayerOptionsDict) == get_type_hints(LayerOptions)
    hints, options = get_type_hints(Settings), get_type_hints(SettingsOptions)
    assert list(hints) == list(options)
    different = [name for name in hints if hints[name] != options[name]]
    assert different == ["include", "exclude", "overrides"]  # which may be written in more than one way
    assert all(str in get_args(options[name]) for name in different[:2])
