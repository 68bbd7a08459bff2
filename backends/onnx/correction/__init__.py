"""Changes to biases and rounded weights of ONNX models that reduce the quantization error."""
