"""Changes to weights and biases of ONNX models that reduce the quantization error."""
