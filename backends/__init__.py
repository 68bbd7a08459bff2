"""Adapters to frameworks, one package each, and what they share: thresholds, settings, the calibration file."""


def __dir__() -> list[str]:
    public = {"calibration", "collection", "formats", "jax", "onnx", "report", "settings", "thresholds", "torch"}
    return sorted(public & globals().keys())
