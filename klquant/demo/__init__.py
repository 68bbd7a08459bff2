"""The demo: a small trained network on real images, calibrated, quantized and judged (``klquant demo``)."""
