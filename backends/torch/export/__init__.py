"""Export a quantized model to ONNX with Q/DQ nodes."""
