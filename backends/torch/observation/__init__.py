"""Statistics of activations while a model runs over calibration data."""
