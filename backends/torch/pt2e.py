"""Thresholds of klquant in PT2E quantization: an observer for torchao's ``prepare_pt2e`` and ``convert_pt2e``.

:func:`with_thresholds` puts :class:`ThresholdObserver` into the configuration of a torchao quantizer, such as
X86InductorQuantizer or XNNPACKQuantizer. A :class:`~torchao.quantization.pt2e.quantizer.QuantizationSpec` takes it as
``observer_or_fake_quant_ctr=ThresholdObserver.with_args(criterion="mse")``.
"""

import dataclasses
import functools
import math
from typing import Any, TypeVar

import torch

from klquant.errors import InvalidInputError, MissingDependencyError

try:
    from torchao.quantization.pt2e import ObserverBase
except ImportError as error:
    raise MissingDependencyError("klquant.backends.torch.pt2e needs torchao: pip install 'klquant[pt2e]'") from error

from ..calibration import Calibration
from ..collection import Observation, Statistics, add_call, look, to_calibration
from ..collection.bins import Bins, level_of
from ..grid_thresholds import grid_thresholds
from ..ranges import STEPS, Range, better_range, candidates
from ..settings import CRITERIA, Criterion, Settings, check_choice
from ..thresholds import LayerThreshold
from .observation.counting import count, extremes

__all__ = ["ThresholdObserver", "with_thresholds"]

_Config = TypeVar("_Config")
_SYMMETRIC = torch.per_tensor_symmetric
_TENSOR = "tensor"  # the observer has only one, whose name it does not know


def with_thresholds(
    config: _Config, *, criterion: Criterion = "entropy", guard: bool = True, num_bins: int = 4001
) -> _Config:
    """Return a configuration of a torchao quantizer in which klquant observes the activations.

    Parameters
    ----------
    config : QuantizationConfig
        Of X86InductorQuantizer, XNNPACKQuantizer or another one with `input_activation` and `output_activation`. It is
        not changed.
    criterion, guard, num_bins
        As for :class:`ThresholdObserver`.

    Returns
    -------
    QuantizationConfig
        Weights and biases as before.

    Raises
    ------
    InvalidInputError
        For a dynamic configuration, whose ranges are found when the model runs, and an unknown criterion.
    """
    check_choice("criterion", criterion, CRITERIA)
    observer = ThresholdObserver.with_args(criterion=criterion, guard=guard, num_bins=num_bins)
    places = ("input_activation", "output_activation")
    specs = {place: spec for place in places if (spec := getattr(config, place, None)) is not None}
    if not specs or any(spec.is_dynamic for spec in specs.values()):
        raise InvalidInputError("`config` must quantize activations statically, got one that does not")
    new = {place: dataclasses.replace(spec, observer_or_fake_quant_ctr=observer) for place, spec in specs.items()}
    return dataclasses.replace(config, **new)  # type: ignore[type-var]


class ThresholdObserver(ObserverBase):  # type: ignore[misc]
    """Counts an activation in one pass, and gives torchao the scale and zero point of klquant's threshold.

    Parameters
    ----------
    dtype : torch.dtype
        Of the quantized tensor: int8 or uint8.
    qscheme : torch.qscheme
        ``per_tensor_symmetric``: [-T, T]. ``per_tensor_affine``: the part of [-T, T] that has values, where that has
        less expected error.
    quant_min, quant_max : int, optional
        The levels; by default all of `dtype`.
    criterion : {"entropy", "max", "percentile", "mse"}
        How T is chosen, see :func:`klquant.backends.thresholds.search_thresholds`.
    guard : bool
        Whether entropy gives way to a better criterion where it clips too much.
    num_bins : int, odd
        Of the histogram, over a power of three.
    eps : float
        Smallest scale.
    is_dynamic : bool
        Must be False.
    **ignored
        What torchao passes to observers of weights, such as ``ch_axis``.
    """

    def __init__(  # noqa: PLR0913 the arguments of torchao's observers
        self,
        dtype: torch.dtype = torch.uint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        quant_min: int | None = None,
        quant_max: int | None = None,
        *,
        criterion: Criterion = "entropy",
        guard: bool = True,
        num_bins: int = 4001,
        eps: float = torch.finfo(torch.float32).eps,
        is_dynamic: bool = False,
        **ignored: Any,
    ) -> None:
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        check_choice("criterion", criterion, CRITERIA)
        if is_dynamic or qscheme not in (_SYMMETRIC, torch.per_tensor_affine):
            raise InvalidInputError(f"expected static quantization of a whole tensor, got {qscheme}, {is_dynamic=}")
        info = torch.iinfo(dtype)
        self.qscheme, self.eps = qscheme, eps
        self.quant_min = info.min if quant_min is None else quant_min
        self.quant_max = info.max if quant_max is None else quant_max
        self._criterion = criterion
        num_bits = round(math.log2(self.quant_max - self.quant_min + 1))
        self._settings = Settings.make(num_bins=num_bins, num_bits=num_bits, guard=guard, passes=1)
        self._seen: dict[str, Observation] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Count a tensor and return it."""
        tensor = x.detach()
        seen = look(_TENSOR, *extremes(tensor), self._bins, functools.partial(count, tensor))
        add_call(self._seen, _TENSOR, seen)
        return x

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and zero point, each of shape (1,).

        Raises InvalidInputError if no data were seen.
        """
        calibration, found = self._calibrated()
        step, zero = self._grid(calibration, found)
        return torch.tensor([max(step, self.eps)], dtype=torch.float32), torch.tensor([zero], dtype=torch.int64)

    def threshold(self) -> LayerThreshold:
        """Return T as it was searched, before it is fitted to a grid with a zero point."""
        return self._calibrated()[1]

    def _bins(self, name: str, amax: float) -> Bins:
        level = level_of(amax)
        return Bins(3 * self._settings.num_bins, 3.0**level, level)

    def _calibrated(self) -> tuple[Calibration, LayerThreshold]:
        if not self._seen:
            raise InvalidInputError("expected calibration data before convert_pt2e, got none: run the prepared model")
        calibration = to_calibration(Statistics(self._seen, 1), Calibration.of(self._settings))
        calibration = calibration._replace(thresholds=calibration.search_thresholds(criterion=self._criterion))
        return calibration, calibration.thresholds[_TENSOR]

    def _grid(self, calibration: Calibration, found: LayerThreshold) -> tuple[float, int]:
        """Return the step, and the level of 0."""
        levels = self.quant_max - self.quant_min
        middle = (self.quant_min + self.quant_max + 1) // 2
        symmetric = found.threshold / (levels // 2), middle
        if self.qscheme == _SYMMETRIC or found.threshold <= 0:
            return symmetric
        if levels == STEPS:
            calibration = calibration._replace(thresholds=grid_thresholds(calibration))
        wanted = _asymmetric(calibration)
        if wanted is None:
            return calibration.thresholds[_TENSOR].threshold / (levels // 2), middle
        step = (wanted.high - wanted.low) / levels
        return step, self.quant_min + round(-wanted.low / step)


def _asymmetric(calibration: Calibration) -> Range | None:
    """Return the range that has less expected error than a symmetric one."""
    found = candidates(calibration)
    return better_range(found.values(), calibration.thresholds[_TENSOR].threshold / 127, 128) if found else None
