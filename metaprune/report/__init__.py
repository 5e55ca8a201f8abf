"""The report: one HTML page that needs no network, no script and no other file."""

from metaprune.report.card import card
from metaprune.report.page import Findings, render, write

__all__ = ["Findings", "card", "render", "write"]
