"""Float models rewritten into operators for which onnxruntime has INT8 kernels; they compute the same."""
