"""Inject faults into calibrations and print the outcomes: `python tests/tools/faults/run.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # to run as a script

import argparse
import json
import time

import torch
from rich.console import Console
from rich.progress import track

from tools.faults.commands import interrupt_commands
from tools.faults.disks import available
from tools.faults.everywhere import interrupt_everywhere
from tools.faults.interrupting import interrupt
from tools.faults.killing import kill_again_and_again
from tools.faults.outcomes import print_table
from tools.faults.ranks import lose_processes
from tools.faults.reading import fail_to_read
from tools.faults.writing import save_everywhere


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--interrupts", type=int, default=20, help="of each kind; 20")
    parser.add_argument("--functions", type=int, default=400, help="that Ctrl-C comes in; 400")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the table too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    kinds = [
        lambda: kill_again_and_again(options.kills, options.seed),
        lambda: interrupt(options.interrupts, options.seed),
        lambda: interrupt_everywhere(options.functions, options.seed),
        lambda: interrupt_commands(options.interrupts, options.seed),
        lambda: fail_to_read(options.interrupts, options.seed),
        lambda: save_everywhere(options.seed, available()),
        lose_processes,
    ]
    rows = [row for kind in track(kinds, "faults", console=Console(stderr=True)) for row in kind()]
    print_table(rows, f"seed {options.seed}, {time.monotonic() - begin:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([row.as_json() for row in rows], indent=1))
    return any(row.wrong for row in rows)


if __name__ == "__main__":
    sys.exit(main())
