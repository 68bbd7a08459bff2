"""Choose by the outputs of a model: scaled channels, ranges, layers in floating point, corrected biases."""
