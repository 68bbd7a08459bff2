"""A model to quantize, and how: the choices that a refinement makes."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import onnx

from ...settings import Engine
from ..model.preparation import Prepared
from ..placement import Placement, Ranges, place_ranges
from ..qdq.float16 import with_float16_scales
from .range_choices import Base


class Refined(NamedTuple):
    """What was chosen."""

    base: Base
    ranges: Ranges
    left_out: tuple[str, ...] = ()
    """Names of nodes and tensors in floating point."""
    functions: tuple[str, ...] = ()
    """Names of nodes of pointwise functions in floating point."""

    @property
    def floats(self) -> tuple[str, ...]:
        """Names of all nodes and tensors in floating point."""
        return (*self.left_out, *self.functions)

    def key(self) -> object:
        """Return what the model depends on, to compare."""
        ends = {name: one.range for name, one in self.ranges.candidates.items()}
        return id(self.base.prepared), self.ranges.thresholds, ends, self.left_out, self.functions


Write: TypeAlias = Callable[[Placement], onnx.ModelProto]


class Place(NamedTuple):
    """A model to quantize."""

    prepared: Prepared
    engine: Engine
    excluded: tuple[str, ...]
    """Names of nodes and tensors."""
    write: Write
    """Returns the model with Q/DQ."""
    float16: bool = False
    """Whether quantizers get scales in float16."""

    def placed(self, chosen: Refined) -> Placement:
        """Return where quantizers go."""
        names = (*self.excluded, *chosen.floats)
        found = place_ranges(chosen.base.prepared, chosen.ranges, self.engine, names)
        return found._replace(prepared=with_float16_scales(found.prepared)) if self.float16 else found
