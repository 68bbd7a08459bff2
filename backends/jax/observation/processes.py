"""The processes of ``jax.distributed`` as a group that the shared collector joins statistics over."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from klquant.errors import PeerError


class JaxProcesses:
    """All processes that ``jax.distributed.initialize`` has connected, each with its own part of the data.

    Pass it as `process_group` of :func:`calibrate` or :func:`quantize`. All processes get the same thresholds.
    """

    def rank(self) -> int:
        """Return the number of this process."""
        return int(jax.process_index())

    def size(self) -> int:
        """Return how many processes there are."""
        return int(jax.process_count())

    def reduce_arrays(self, values: "np.ndarray[Any, Any]", operation: str) -> "np.ndarray[Any, Any]":
        """Return the elementwise SUM or MAX over all processes, exactly: bytes are gathered, and the host adds."""
        own = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        try:
            gathered = np.asarray(multihost_utils.process_allgather(own)).reshape(self.size(), -1)
        except RuntimeError as error:
            raise PeerError(f"a process of jax.distributed is gone: {error}") from error
        rows = np.frombuffer(gathered.tobytes(), values.dtype).reshape(self.size(), *values.shape)
        total: np.ndarray[Any, Any] = rows.max(axis=0) if operation == "MAX" else rows.sum(axis=0, dtype=values.dtype)
        return total
