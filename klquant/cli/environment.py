"""Which features of klquant work here: what each needs, and what there is."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from .probe import Probe, probe

# What each is good for. Names with commas are extras of klquant that are needed together.
FEATURES = {
    "": "the core on NumPy arrays",
    "jax": "the core on JAX arrays",
    "torch": "PyTorch models",
    "onnx": "ONNX models",
    "torch,onnx": "PyTorch models to ONNX",
    "report": "reports as HTML",
    "plots": "pictures (klquant.plots)",
    "demo": "klquant demo",
}
# Libraries that no extra of klquant names, for commands on ONNX models.
OTHERS = {"openvino": "klquant inspect --engine openvino", "pillow": "pictures as klquant calibrate --data"}
_INSTRUCTIONS = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "AMX": {"amx_int8"},
    "dot product": {"asimddp"},
    "I8MM": {"i8mm"},
}
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[([\w,-]+)\])?(?:>=([\d.]+))?")
_EXTRA = re.compile(r"""extra == ["']([\w-]+)["']""")


class Package(NamedTuple):
    """A library that klquant uses."""

    name: str
    minimum: str
    version: str | None
    """None if it is not installed."""
    problem: str
    """Why it cannot be used; empty if it can."""
    devices: Sequence[str]
    """Where it can compute."""


class Feature(NamedTuple):
    """Something that klquant can do."""

    what: str
    usable: bool
    missing: list[str]
    """Packages that it needs and that cannot be used."""
    install: str
    """What to type for it to become usable."""


class Environment(NamedTuple):
    """Everything that is told."""

    versions: dict[str, str]
    """Of klquant, Python and the system."""
    cpu: str
    instructions: list[str]
    """Of the CPU, those that matter to INT8; none where the system does not tell."""
    packages: list[Package]
    features: list[Feature]


def examine() -> Environment:
    """Ask every library that klquant may use, each in a process of its own."""
    needs = {extras: _required(extras) for extras in FEATURES} | {
        name: {**_required("onnx"), name: ""} for name in OTHERS
    }
    minimums = {name: minimum for required in needs.values() for name, minimum in required.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        probes = dict(zip(minimums, pool.map(probe, map(_module, minimums)), strict=True))
    packages = {name: _package(name, minimum, probes[name]) for name, minimum in minimums.items()}
    features = [_feature(name, required, packages) for name, required in needs.items()]
    versions = {"klquant": metadata.version("klquant"), "python": platform.python_version()}
    return Environment({**versions, "system": platform.platform()}, *_cpu(), list(packages.values()), features)


def _required(extras: str) -> dict[str, str]:
    """Return the least versions of the packages that these extras of klquant need, and the core."""
    wanted, found = {"", *filter(None, extras.split(","))}, dict[str, str]()
    for line in metadata.requires("klquant") or ():
        extra, requirement = _EXTRA.search(line), _REQUIREMENT.match(line)
        if requirement is None or (extra[1] if extra else "") not in wanted:
            continue
        name, more, minimum = requirement.groups()
        found.update(_required(more) if name == "klquant" else {name: minimum or ""})
    return found


def _package(name: str, minimum: str, found: Probe) -> Package:
    version: str | None = found.version
    if version is not None:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:  # of another name, such as onnxruntime-gpu
            version = found.version
    if version is None:
        return Package(name, minimum, None, "not installed", ())
    too_old = f"too old, {minimum} is needed" if _is_older(version, minimum) else ""
    return Package(name, minimum, version, found.error or too_old, found.devices)


def _feature(name: str, required: Mapping[str, str], packages: Mapping[str, Package]) -> Feature:
    missing = [
        f"{package}>={minimum}" if minimum else package
        for package, minimum in required.items()
        if packages[package].problem
    ]
    what = {**FEATURES, **OTHERS}[name]
    wanted = f"'klquant[onnx]' {name}" if name in OTHERS else f"'klquant[{name}]'" if name else "klquant"
    return Feature(what, not missing, missing, f"pip install -U {wanted}" if missing else "")


def _module(package: str) -> str:
    return {"pillow": "PIL", "scikit-learn": "sklearn"}.get(package, package)


def _is_older(version: str, minimum: str) -> bool:
    """Compare the numbers of two versions; one that is not known is not old."""
    numbers = [[int(part) for part in re.findall(r"\d+", text)] for text in (version, minimum)]
    return numbers[0] != [] and numbers[0] < numbers[1]


def _cpu() -> tuple[str, list[str]]:
    """Return the CPU's name, and what Linux says that it can do."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    told: Mapping[str, str] = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = {*told.get("flags", "").split(), *told.get("Features", "").split()}
    name = told.get("model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores", [name for name, any_of in _INSTRUCTIONS.items() if flags & any_of]
