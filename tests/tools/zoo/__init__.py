"""Tables of what is quantized in models that others made; run by hand."""
