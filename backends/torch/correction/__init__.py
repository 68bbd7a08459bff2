"""Changes to weights and biases that reduce the quantization error."""
