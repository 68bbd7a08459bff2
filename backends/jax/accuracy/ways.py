"""A function that can be quantized in several ways, for ``auto`` and ``tune``."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from klquant.errors import CalibrationWarning, InvalidInputError

from ...accuracy.comparison import Metric
from ...accuracy.outputs import Outputs
from ...accuracy.splits import Split
from ...accuracy.trials import Recipe
from ...batches import numbered
from ...calibration import Calibration
from ...settings import CRITERIA, SettingsOptions
from ..calibration import calibrate
from ..model.arguments import Function, jitted
from ..quantization import requantize
from ..quantized_function import QuantizedFunction
from .comparison import named_outputs
from .criterion_choice import auto_thresholds
from .sensitivity import product_of

ZERO_POINTS, CORRECT_BIAS = "zero_points", "correct_bias"


class Ways:
    """A calibrated function, its results on data to measure on, and how to quantize it."""

    criteria = (*CRITERIA, "auto")
    steps = (ZERO_POINTS, CORRECT_BIAS)
    last_steps = ()

    def __init__(
        self, f: Function, params: Any, split: Split, settings: SettingsOptions, metric: Metric | None
    ) -> None:
        self.f, self.params, self.split, self.metric = f, params, split, metric
        self.exact = jitted(f)
        run = self.runner(self.exact)
        self.reference: list[Outputs] = [run(batch) for _, batch in numbered(split.validation)]
        if not self.reference:
            raise InvalidInputError("expected at least one batch to measure on, got none")
        self.first = next(iter(split.validation))
        with quietly():
            self.found = calibrate(f, params, split.calibration, **settings)

    def runner(self, function: Callable[..., Any]) -> Callable[[Any], Outputs]:
        """Return a function of a batch that returns the outputs by name."""
        return partial(named_outputs, function, self.params)

    def make(self, recipe: Recipe) -> QuantizedFunction:
        """Return the function of a recipe; what warnings would say is measured."""
        correction = self.split.calibration if CORRECT_BIAS in recipe.steps else None
        with quietly():
            return requantize(
                self.f,
                self.params,
                self.first,
                self.searched(recipe),
                zero_points=ZERO_POINTS in recipe.steps,
                correction_batches=correction,
                exclude=recipe.exclude,
            )

    def searched(self, recipe: Recipe) -> Calibration:
        """Return the calibration with the thresholds of a recipe."""
        with quietly():
            if recipe.criterion == "auto":
                thresholds = auto_thresholds(self.f, self.params, self.found, self.split.calibration)
            else:
                thresholds = self.found.search_thresholds(criterion=recipe.criterion)  # type: ignore[arg-type]
        return self.found._replace(thresholds=thresholds)

    @property
    def products(self) -> set[str]:
        """Return the names of all products, also of those that stay in floating point."""
        return {product_of(name) for name in (*self.found.thresholds, *self.found.skipped)}

    def int8_share(self, quantized: QuantizedFunction) -> float:
        """Return the share of the products that are in INT8."""
        return len({product_of(name) for name in quantized.thresholds}) / len(self.products)


@contextmanager
def quietly() -> Iterator[None]:
    """Ignore the warnings of a calibration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        yield
