"""The report: one HTML page that needs no network, no script and no other file."""

from metaprune.report.campaign import CampaignFindings
from metaprune.report.card import card
from metaprune.report.page import Findings, render, write

__all__ = ["CampaignFindings", "Findings", "card", "render", "write"]
