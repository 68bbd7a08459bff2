"""Disturb calibrations in every way that was thought of, and print what came of it: `python tests/faults.py`."""

import argparse
import json
import sys
import time
from pathlib import Path

from faults.interrupting import interrupt
from faults.killing import kill_again_and_again
from faults.outcomes import print_table
from faults.writing import save_everywhere


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--interrupts", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    begin = time.monotonic()
    rows = [
        *kill_again_and_again(options.kills, options.seed),
        *interrupt(options.interrupts, options.seed),
        *save_everywhere(options.seed),
    ]
    print_table(rows, f"seed {options.seed}, {time.monotonic() - begin:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([row.as_json() for row in rows], indent=1))
    return any(row.wrong for row in rows)


if __name__ == "__main__":
    sys.exit(main())
