"""Plots for notebooks and reports, drawn with matplotlib.

Every function draws on the given Axes and returns it. Without Axes it makes a new pyplot figure, which notebooks show.
No global setting is changed.
"""

from klquant.errors import MissingDependencyError

try:
    import matplotlib as _matplotlib  # noqa: F401
except ImportError as error:
    raise MissingDependencyError("klquant.plots needs matplotlib: pip install 'klquant[plots]'") from error

from klquant.plots.histograms import plot_divergence, plot_histogram
from klquant.plots.layers import plot_layers

__all__ = ["plot_divergence", "plot_histogram", "plot_layers"]


def __dir__() -> list[str]:
    return __all__
