"""Which nodes of a quantized model each engine runs in INT8."""
