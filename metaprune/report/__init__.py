"""The report: one HTML page that needs no network, no script and no other file."""

from metaprune.report.page import Findings, render, write

__all__ = ["Findings", "render", "write"]
