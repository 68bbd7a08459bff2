"""Quantize an ONNX model by NNCF: MODEL DATA.npz TARGET. It runs in an environment with nncf, without klquant."""

import sys

import nncf
import numpy as np
import onnx


def main() -> None:
    path, data, target = sys.argv[1:]
    feeds: dict[int, dict[str, np.ndarray]] = {}
    with np.load(data) as arrays:
        for key in arrays.files:
            number, _, name = key.partition("/")
            feeds.setdefault(int(number), {})[name] = arrays[key]
    model = onnx.load(path)
    onnx.save(nncf.quantize(model, nncf.Dataset([feeds[k] for k in sorted(feeds)]), subset_size=300), target)


if __name__ == "__main__":
    main()
