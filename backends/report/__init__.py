"""A calibration as one HTML page that needs nothing else, and the same numbers as JSON; for every backend.

:func:`write_report` writes the page: :func:`describe` gathers what it says in a :class:`Report`, :func:`render_html`
draws it.
"""

from .data import Report, describe
from .page import render_html, write_report

__all__ = ["Report", "describe", "render_html", "write_report"]


def __dir__() -> list[str]:
    return __all__
