"""Fuzzing of all loaders: `python tests/tools/fuzz/run.py`; tests/project/test_fuzz.py runs a few inputs."""
