"""Quantize an ONNX model by NNCF: MODEL DATA.npz TARGET [transformer]. Needs nncf, not klquant."""

import sys

import numpy as np
import onnx


def main() -> None:
    import nncf

    path, data, target = sys.argv[1:4]
    feeds: dict[int, dict[str, np.ndarray]] = {}
    with np.load(data) as arrays:
        for key in arrays.files:
            number, _, name = key.partition("/")
            feeds.setdefault(int(number), {})[name] = arrays[key]
    model = onnx.load(path)
    kind = nncf.ModelType.TRANSFORMER if "transformer" in sys.argv[4:] else None
    dataset = nncf.Dataset([feeds[k] for k in sorted(feeds)])
    onnx.save(nncf.quantize(model, dataset, subset_size=300, model_type=kind), target)


if __name__ == "__main__":
    main()
