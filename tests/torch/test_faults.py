"""What tests/faults.py tries at length, a few times each."""

from tools.faults.everywhere import interrupt_everywhere
from tools.faults.interrupting import TASKS, interrupt
from tools.faults.killing import kill_again_and_again
from tools.faults.ranks import lose_processes
from tools.faults.reading import fail_to_read
from tools.faults.writing import save_everywhere


def assert_fine(rows, tried):
    assert [complaint for row in rows for complaint in row.wrong] == []
    assert sum(row.outcomes.total() for row in rows) == tried


def test_killing():
    assert_fine(kill_again_and_again(4, seed=1), 4)


def test_interrupting():
    assert_fine(interrupt(1, seed=1), len(TASKS))


def test_interrupting_everywhere():
    functions, lines = interrupt_everywhere(10, seed=1, lines=40)
    assert_fine([functions], 10)
    assert_fine([lines], lines.outcomes.total())
    assert lines.outcomes.keys() >= {"absent, comes out", "whole, comes out"}


def test_reading():
    *failing, damage = fail_to_read(2, seed=1)
    assert_fine(failing, 4)
    assert_fine([damage], 259)


def test_writing():
    kinds = ["a file may have 4 KiB", "a file in place of the folder"]
    *saving, temporary, resuming = save_everywhere(1, kinds)
    assert_fine(saving, 2 * 14)
    assert_fine([temporary, resuming], 20 + 2)


def test_losing_a_process():
    assert_fine(lose_processes(["in pass 2", "in an exchange after it"], [0]), 3)
