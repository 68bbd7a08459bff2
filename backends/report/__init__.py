"""A calibration as one HTML page that needs nothing else, and the same numbers as JSON; for every backend."""

from .content import Report, describe
from .html import render_html, write_report

__all__ = ["Report", "describe", "render_html", "write_report"]
