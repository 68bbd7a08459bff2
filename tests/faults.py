"""Disturb calibrations in every way that was thought of, and print what came of it: `python tests/faults.py`."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from faults.commands import interrupt_commands
from faults.disks import available
from faults.everywhere import interrupt_everywhere
from faults.interrupting import interrupt
from faults.killing import kill_again_and_again
from faults.outcomes import print_table
from faults.ranks import lose_processes
from faults.reading import fail_to_read
from faults.writing import save_everywhere
from rich.console import Console
from rich.progress import track


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
