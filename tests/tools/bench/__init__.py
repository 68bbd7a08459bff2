"""Benchmarks and accuracy tables."""
