"""Tools that are run by hand: benchmarks, fault injection, fuzzing, mutation testing."""
