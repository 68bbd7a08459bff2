"""What quantization costs an ONNX model on its engine, and how to spend less."""
