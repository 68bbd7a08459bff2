"""Hostile input: all loaders against damaged files, by `python tests/fuzz/run.py`; some of it in tests/test_fuzz.py."""
