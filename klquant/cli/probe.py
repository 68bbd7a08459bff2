"""What a library says of itself: ``probe`` asks it in a process of its own, as it may be broken, slow or noisy.

That process runs this very file, which therefore imports the standard library alone.
"""

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any, NamedTuple

TIMEOUT = 120  # seconds
_START = "import runpy, sys; sys.path[:] = {path!r}; runpy.run_path({file!r}, run_name='__main__')"
_VARIABLES = {"CI": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # OpenVINO reports no use, JAX takes no memory


class Probe(NamedTuple):
    """What became of importing a library."""

    version: str | None
    """None if it is not installed."""
    error: str = ""
    """Why it cannot be imported."""
    devices: tuple[str, ...] = ()
    """Where it can compute."""


def probe(module: str) -> Probe:
    """Import a library elsewhere, and return what it says."""
    if find_spec(module) is None:
        return Probe(None)
    command = [sys.executable, "-c", _START.format(path=sys.path, file=__file__), module]
    environment = {**os.environ, **_VARIABLES}
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT, env=environment
        )
    except subprocess.TimeoutExpired:
        return Probe("", f"importing it took more than {TIMEOUT} s")
    try:
        return Probe(*json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        return Probe("", f"importing it ended Python with exit code {done.returncode}")


def _ask(module: str) -> Probe:
    try:
        library = importlib.import_module(module)
        devices = _DEVICES[module](library) if module in _DEVICES else []
        return Probe(str(getattr(library, "__version__", "")), "", tuple(devices))
    except Exception as error:  # a broken installation may raise anything
        return Probe("", " ".join(f"{type(error).__name__}: {error}".split())[:300])


def _torch_devices(torch: Any) -> list[str]:
    found = [f"cpu ({torch.get_num_threads()} threads)"]
    for kind in ("cuda", "xpu"):
        interface = getattr(torch, kind, None)
        if interface is not None and interface.is_available():
            names = [interface.get_device_name(k) for k in range(interface.device_count())]
            found += [f"{kind}:{k} ({name})" for k, name in enumerate(names)]
    return [*found, "mps"] if torch.backends.mps.is_available() else found


def _jax_devices(jax: Any) -> list[str]:
    return [f"{device.platform}:{device.id} ({device.device_kind})" for device in jax.devices()]


def _openvino_devices(openvino: Any) -> list[str]:
    core = openvino.Core()
    return [f"{name} ({core.get_property(name, 'FULL_DEVICE_NAME')})" for name in core.available_devices]


_DEVICES = {
    "torch": _torch_devices,
    "jax": _jax_devices,
    "onnxruntime": lambda onnxruntime: onnxruntime.get_available_providers(),
    "openvino": _openvino_devices,
}

if __name__ == "__main__":
    print(json.dumps(_ask(sys.argv[1])))  # noqa: T201
