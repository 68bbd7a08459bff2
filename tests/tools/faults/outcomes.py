"""The outcomes of the trials of a fault, and the table of all faults."""

from collections import Counter
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Row(NamedTuple):
    fault: str
    outcomes: Counter
    """The number of trials by outcome."""
    checked: str
    wrong: tuple[str, ...] = ()

    def as_json(self):
        return {**self._asdict(), "outcomes": dict(self.outcomes), "tried": self.outcomes.total()}


class Trials:
    """Collects the outcomes of one fault, and what was wrong with them."""

    def __init__(self, fault, checked):
        self.fault, self.checked, self.outcomes, self.wrong = fault, checked, Counter(), []

    def add(self, outcome, *checks):
        """Count an outcome. Each check is a pair: whether it passed, and what is wrong if not."""
        self.outcomes[outcome] += 1
        for fine, what in checks:
            self.expect(fine, f"{outcome}: {what}")

    def expect(self, fine, what):
        if not fine:
            self.wrong.append(f"{self.fault}: {what}")

    def row(self):
        return Row(self.fault, self.outcomes, self.checked, tuple(self.wrong))


def print_table(rows, title):
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in ("fault", "tried", "outcomes", "checked", "wrong"):
        table.add_column(column, justify="right" if column in ("tried", "wrong") else "left", overflow="fold")
    for row in rows:
        outcomes = "\n".join(f"{number} {outcome}" for outcome, number in sorted(row.outcomes.items()))
        cells = (row.fault, str(row.outcomes.total()), outcomes, row.checked, str(len(row.wrong)))
        table.add_row(*map(Text, cells))
    console = Console(width=150)
    console.print(table)
    for row in rows:
        for complaint in row.wrong:
            console.print(Text(f"WRONG: {complaint}"))
