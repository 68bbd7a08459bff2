"""Pictures for notebooks and reports, drawn by matplotlib; imported on demand.

Every function draws on the Axes that it is given and returns it. Without one it makes a new pyplot figure, which
notebooks show. Nothing global is changed.
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
