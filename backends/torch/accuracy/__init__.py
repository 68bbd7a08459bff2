"""Measure what quantization costs, layer by layer, and choose criteria accordingly."""
