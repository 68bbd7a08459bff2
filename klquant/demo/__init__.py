"""The demo: a small trained network is calibrated, quantized and evaluated on real images (``klquant demo``)."""
