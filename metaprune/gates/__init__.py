"""Training-time pruning: gates on units or branches that are learnt, and closed ones that leave physically."""

from metaprune.gates._base import GATES, Gated, GatedNetwork, Gating, gated_axes, kept_within
from metaprune.gates.consensus import Consensus
from metaprune.gates.ecodiff import EcoDiff
from metaprune.gates.lapp import Lapp

__all__ = [
    "GATES",
    "Consensus",
    "EcoDiff",
    "Gated",
    "GatedNetwork",
    "Gating",
    "Lapp",
    "gated_axes",
    "kept_within",
]
