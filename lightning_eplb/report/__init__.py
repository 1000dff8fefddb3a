"""A page that shows a load, and what balancing would make of it: one HTML file, complete in itself."""

from lightning_eplb.report.content import ReportContent, prepare
from lightning_eplb.report.page import render

__all__ = ["ReportContent", "prepare", "render"]
