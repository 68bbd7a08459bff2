import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import klquant

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


def test_the_public_names_are_these():
    assert set(klquant.__all__) == NAMES
    assert klquant.__all__ == sorted(klquant.__all__)
    assert all(hasattr(klquant, name) for name in NAMES)


def test_no_other_public_name_is_a_function_or_class_by_accident():
    others = {name for name in vars(klquant) if not name.startswith("_")} - NAMES
    assert all(inspect.ismodule(getattr(klquant, name)) for name in others)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_documented(name):
    doc = inspect.getdoc(getattr(klquant, name))
    assert doc.splitlines()[0].endswith(".")
    headings = [
        title for title, line in zip(doc.splitlines(), doc.splitlines()[1:], strict=False) if set(line) == {"-"}
    ]
    assert [h for h in headings if h != "Notes"] == ["Parameters", "Returns", "Raises", "Examples"]
    assert ">>> " in doc.partition("Examples")[2]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_is_annotated_and_its_parameters_documented(name):
    function = getattr(klquant, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    section = inspect.getdoc(function).partition("Parameters\n")[2].partition("Returns\n")[0]
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert parameter.name in section


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_keyword_only(name):
    parameters = inspect.signature(getattr(klquant, name)).parameters.values()
    optional = [p for p in parameters if p.default is not inspect.Parameter.empty]
    if name == "merge_partition":  # takes two numbers and no array
        return
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in optional)


@pytest.mark.parametrize("name", sorted(NAMES - set(FUNCTIONS)))
def test_every_class_is_documented(name):
    assert vars(getattr(klquant, name))["__doc__"]


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
