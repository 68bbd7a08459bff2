"""Every error that klquant raises on purpose.

Each class is a :class:`KLQuantError` and also the built-in error that a caller would expect. Both kinds of ``except``
work.
"""


class KLQuantError(Exception):
    """Base class of all errors that klquant raises."""


class ArrayTypeError(KLQuantError, TypeError):
    """An argument has an unsupported type, library or dtype, or two arrays come from different libraries."""


class InvalidInputError(KLQuantError, ValueError):
    """An argument has the wrong shape, or a value for which the algorithm is not defined."""


class InfeasibleError(KLQuantError, ValueError):
    """No candidate threshold is feasible, for example because the histogram is empty."""


class StageError(KLQuantError, RuntimeError):
    """A calibration stage was called before a stage that it depends on."""


class ModelError(KLQuantError, RuntimeError):
    """The model itself failed on a batch. Its own error is the ``__cause__``."""


class PeerError(KLQuantError, RuntimeError):
    """Another process of the same calibration failed. Its own error message has the reason."""


class MissingDependencyError(KLQuantError, ImportError):
    """An optional dependency is needed but not installed."""


class CalibrationWarning(UserWarning):
    """Calibration continued, but check the layer or tensor that the message names."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.better: dict[str, str] = {}
        """Criteria that expect less error, by layer, to be passed as overrides."""

    def __str__(self) -> str:
        """Return the message, and the overrides to pass in Python."""
        options = {name: {"criterion": criterion} for name, criterion in self.better.items()}
        return super().__str__() + (f"; to take the better criterion pass overrides={options}" if options else "")

    @property
    def message(self) -> str:
        """Return the message alone."""
        return super().__str__()
