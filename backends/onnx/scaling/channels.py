"""What is seen of the channels of activations in an ONNX model."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from klquant.errors import InvalidInputError

from ...smoothing import Channels
from ..correction.data import read_feeds
from ..execution import open_onnxruntime, with_outputs
from ..feeds import Array
from ..model.preparation import Prepared


def observe_channels(prepared: Prepared, axes: Mapping[str, int], batches: Iterable[Any]) -> dict[str, Channels]:
    """Run the float model; return what the channels of each activation hold, given their axis."""
    seen: dict[str, list[Array]] = {}
    count = dict.fromkeys(axes, 0)
    with open_onnxruntime(with_outputs(prepared.model, axes), optimized=True) as session:
        for number, feed in enumerate(read_feeds(prepared, batches)):
            found = session([name for name in axes if name not in feed] or prepared.graph.outputs, feed)
            for name, axis in axes.items():
                values = np.moveaxis((feed | found)[name], axis, -1)
                rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
                if not np.isfinite(rows).all():
                    raise InvalidInputError(
                        f"tensor `{name}`, batch {number}: values must be finite, got NaN or infinity"
                    )
                low, high, power = seen.setdefault(name, [np.zeros(rows.shape[1]) for _ in range(3)])
                np.minimum(low, rows.min(0, initial=0.0), out=low)
                np.maximum(high, rows.max(0, initial=0.0), out=high)
                power += np.square(rows).sum(0)
                count[name] += len(rows)
    return {name: Channels(low, high, power / max(count[name], 1)) for name, (low, high, power) in seen.items()}
