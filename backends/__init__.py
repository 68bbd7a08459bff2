"""Adapters to frameworks; each is imported on its own: ``import klquant.backends.torch``."""
