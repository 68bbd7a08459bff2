"""What other packages add by entry points: criteria, formats of tables, and backends.

A package names them in its ``pyproject.toml``::

    [project.entry-points."klquant.criteria"]
    three_sigma = "my_package:three_sigma"

A criterion is a function ``(hist, edges, *, num_quantized_bins) -> T`` of a histogram without its zeros; it returns a
number, or a :class:`klquant.Threshold`. A format is a :class:`klquant.backends.formats.Format`. A backend is a module
with functions such as ``calibrate``.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeAlias

from klquant.errors import InvalidInputError

__all__ = ["installed", "load"]

Kind: TypeAlias = Literal["criteria", "formats", "backends"]


def installed(kind: Kind) -> dict[str, EntryPoint]:
    """Return what is installed of a kind, by name, without importing it.

    Parameters
    ----------
    kind : {"criteria", "formats", "backends"}

    Returns
    -------
    dict
        Entry points of the group ``klquant.<kind>``.
    """
    return {point.name: point for point in entry_points(group=f"klquant.{kind}")}


def load(kind: Kind, name: str) -> Any:
    """Import something that another package adds.

    Parameters
    ----------
    kind : {"criteria", "formats", "backends"}
    name : str
        Of the entry point.

    Returns
    -------
    object
        What the entry point names.

    Raises
    ------
    InvalidInputError
        If nothing of this name is installed, or its import fails.
    """
    found = installed(kind)
    if name not in found:
        names = ", ".join(found) or "none"
        raise InvalidInputError(f"expected one of the installed {kind} of other packages ({names}), got {name!r}")
    try:
        return found[name].load()
    except Exception as error:  # of any package
        raise InvalidInputError(f"`{found[name].value}`, one of the {kind}, cannot be imported: {error}") from error
