"""Adapters to frameworks, one package each, and what they share: thresholds, settings, the calibration file."""
