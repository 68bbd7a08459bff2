"""Every error that klquant raises on purpose: one small tree.

Each class is a :class:`KLQuantError` and the built-in error a caller would expect, so both kinds of
``except`` work.
"""


class KLQuantError(Exception):
    """Base of all errors raised by klquant."""


class ArrayTypeError(KLQuantError, TypeError):
    """An argument is no array of a supported library or dtype, or two arrays come from different libraries."""


class InvalidInputError(KLQuantError, ValueError):
    """An argument has the wrong shape, or values that the algorithm is not defined for."""


class InfeasibleError(KLQuantError, ValueError):
    """No candidate threshold is feasible: the histogram holds nothing that could be quantized."""


class StageError(KLQuantError, RuntimeError):
    """A calibration stage was asked for before the stage that it needs."""


class ModelError(KLQuantError, RuntimeError):
    """The model itself failed on a batch; its own error is the cause."""


class PeerError(KLQuantError, RuntimeError):
    """Another of the processes that calibrate together failed; it says why."""


class MissingDependencyError(KLQuantError, ImportError):
    """An optional dependency is needed and not installed."""


class CalibrationWarning(UserWarning):
    """Calibration went on, and a person should look at the layer that the message names."""
