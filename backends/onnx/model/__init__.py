"""ONNX models: loading, preparation, the graph and its operators, saving."""
