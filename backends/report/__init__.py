"""A calibration as a self-contained HTML page and as JSON, for every backend.

:func:`write_report` writes the page. It calls :func:`describe`, which collects the content in a :class:`Report`, and
:func:`render_html`, which renders that as HTML.
"""

from .data import Report, describe
from .page import render_html, write_report

__all__ = ["Report", "describe", "render_html", "write_report"]


def __dir__() -> list[str]:
    return __all__
