"""Fault injection: `run.py` runs all kinds of faults. Each other file here is one kind, or a helper."""
