import importlib.metadata
import inspect
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType

import pytest

import klquant
import klquant.reference

NAMES = {
    "ArrayTypeError",
    "CalibrationWarning",
    "Histogram",
    "InfeasibleError",
    "InvalidInputError",
    "KLQuantError",
    "MissingDependencyError",
    "ModelError",
    "PeerError",
    "StageError",
    "Threshold",
    "dequantize",
    "divergence_curve",
    "fake_quantize",
    "histogram",
    "kl_divergence",
    "max_threshold",
    "merge",
    "merge_partition",
    "mse_curve",
    "mse_threshold",
    "optimal_threshold",
    "percentile_threshold",
    "quantize",
    "quantized_distribution",
    "scale",
    "smooth",
}
FUNCTIONS = [name for name in sorted(NAMES) if inspect.isfunction(getattr(klquant, name, None))]
MODULES = [
    importlib.import_module(name)
    for name in (
        "klquant",
        "klquant.plots",
        "klquant.presets",
        "klquant.testing",
        "klquant.backends.torch",
        *(["klquant.backends.jax"] if find_spec("jax") else []),
        "klquant.backends.onnx",
        "klquant.backends.formats",
        "klquant.backends.report",
    )
]
PUBLIC = {f"{module.__name__}.{name}": getattr(module, name) for module in MODULES for name in module.__all__}
ALL_FUNCTIONS = {name: thing for name, thing in PUBLIC.items() if inspect.isfunction(thing)}
METHODS = {
    f"{name}.{method}": getattr(thing, method)
    for name, thing in PUBLIC.items()
    if inspect.isclass(thing)
    for method, kind in vars(thing).items()
    if not method.startswith("_") and isinstance(kind, (FunctionType, classmethod, staticmethod))
}
DATA = {"path", "batch"}  # arguments that may be left out, and are no options
NEVER_FAIL = {"klquant.backends.onnx.summarize"}


def test_the_public_names_are_these():
    assert set(klquant.__all__) == NAMES
    assert klquant.__all__ == sorted(klquant.__all__)
    assert all(hasattr(klquant, name) for name in NAMES)


def test_no_other_public_name_is_a_function_or_class_by_accident():
    others = {name for name in vars(klquant) if not name.startswith("_")} - NAMES
    assert all(inspect.ismodule(getattr(klquant, name)) for name in others)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_of_the_core_has_an_example(name):
    doc = inspect.getdoc(getattr(klquant, name))
    assert doc.splitlines()[0].endswith(".")
    assert [h for h in headings(doc) if h != "Notes"] == ["Parameters", "Returns", "Raises", "Examples"]
    assert ">>> " in doc.partition("Examples")[2]


def headings(doc):
    return [title for title, line in zip(doc.splitlines(), doc.splitlines()[1:], strict=False) if set(line) == {"-"}]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_there_and_named_by_its_module(module):
    assert len(module.__all__) == len(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)
    if module.__name__ not in ("klquant.presets", "klquant.plots"):  # modules of a few functions only
        assert [name for name in module.__all__ if not re.search(rf"`{name}`", module.__doc__)] == []


@pytest.mark.parametrize(
    "name", ["klquant.backends.formats", "klquant.backends.report", "klquant.cli", "klquant.plots"]
)
def test_dir_lists_the_public_names_and_no_others(name):
    module = importlib.import_module(name)
    assert dir(module) == sorted(module.__all__)


ALL_MODULES = [*MODULES, klquant.reference, importlib.import_module("klquant.backends.collection")]


@pytest.mark.parametrize("module", ALL_MODULES, ids=lambda module: module.__name__)
def test_dir_lists_what_is_public_and_nothing_else(module):
    modules = {"backends", "errors", "plots", "presets", "reference", "testing"} if module is klquant else set()
    assert dir(module) == sorted({*module.__all__, *modules})


def test_dir_of_the_backends_lists_what_is_loaded_and_public(tmp_path):
    public = ["calibration", "collection", "formats", "jax", "onnx", "report", "settings", "thresholds", "torch"]
    assert dir(klquant.backends) == [name for name in public if name != "jax" or find_spec("jax")]
    code = "import klquant.backends.settings; print(dir(klquant), dir(klquant.backends))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "'reference'" not in run.stdout
    assert run.stdout.endswith("['settings']\n")


@pytest.mark.parametrize("name", ALL_FUNCTIONS)
def test_every_function_is_documented(name):
    function = ALL_FUNCTIONS[name]
    doc = inspect.getdoc(function)
    assert doc.splitlines()[0].endswith(".")
    returns = [] if inspect.signature(function).return_annotation is None else ["Returns"]
    fails = [] if name in NEVER_FAIL else ["Raises"]
    order = ["Parameters", *returns, *fails, "Warns", "Notes", "Examples"]
    found = headings(doc)
    assert found == [heading for heading in order if heading in found]
    assert {"Parameters", *returns, *fails} <= set(found)


@pytest.mark.parametrize("name", {**ALL_FUNCTIONS, **METHODS})
def test_every_parameter_is_typed_and_the_options_are_keyword_only(name):
    signature = inspect.signature({**ALL_FUNCTIONS, **METHODS}[name])
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty or parameter.name == "self"
        optional = parameter.default is not inspect.Parameter.empty
        assert not optional or parameter.kind is parameter.KEYWORD_ONLY or parameter.name in DATA


@pytest.mark.parametrize("name", ALL_FUNCTIONS)
def test_every_parameter_is_documented(name):
    section = inspect.getdoc(ALL_FUNCTIONS[name]).partition("Parameters\n")[2]
    section = re.split(r"\n\w+\n--+\n", section)[0]
    described = {word for line in section.splitlines() if line[:1].strip() for word in re.findall(r"\w+", line)}
    assert set(inspect.signature(ALL_FUNCTIONS[name]).parameters) <= described


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_documented(name):
    assert inspect.getdoc(METHODS[name]).splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", [name for name, thing in PUBLIC.items() if inspect.isclass(thing)])
def test_every_class_is_documented(name):
    doc = vars(PUBLIC[name])["__doc__"]
    assert doc
    assert not doc.startswith(f"{PUBLIC[name].__name__}(")  # the default docstring of NamedTuple


def test_an_option_has_one_default_everywhere():
    defaults = {}
    for name, function in {**ALL_FUNCTIONS, **METHODS}.items():
        for parameter in inspect.signature(function).parameters.values():
            if parameter.default not in (inspect.Parameter.empty, None) and "presets" not in name:
                defaults.setdefault(parameter.name, set()).add(parameter.default)
    assert {option: found for option, found in defaults.items() if len(found) > 1} == {}
    assert defaults["criterion"] == {"entropy"}
    assert defaults["num_bins"] == {4001}


def test_the_oracle_lists_what_it_offers():
    own = [thing for thing in vars(klquant.reference).values() if inspect.isfunction(thing)]
    assert sorted(one.__name__ for one in own if not one.__name__.startswith("_")) == klquant.reference.__all__


def test_the_version_is_that_of_the_package():
    assert klquant.__version__ == importlib.metadata.version("klquant")


def test_types_are_shipped():
    assert (Path(klquant.__file__).parent / "py.typed").is_file()


def test_importing_klquant_loads_no_framework(tmp_path):
    code = "import sys, klquant; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    heavy = {"jax", "jaxlib", "torch", "onnx", "onnxruntime", "scipy", "sklearn", "matplotlib", "rich", "click"}
    assert not heavy & set(loaded.stdout.split())


def test_numpy_functions_work_where_jax_cannot_be_imported(tmp_path):
    code = """
import sys

class NoJax:
    def find_spec(name, *_):
        if name.startswith("jax"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoJax)
import numpy as np, klquant
hist, edges = klquant.histogram(np.arange(-20.0, 21.0), num_bins=15)
threshold = klquant.optimal_threshold(hist, edges, num_quantized_bins=3)
print(klquant.fake_quantize(np.ones(3), klquant.scale(float(threshold))).shape)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout == "(3,)\n"
