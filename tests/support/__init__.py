"""Shared by the tests: networks, models, data, helper processes."""
