"""Tiny hard networks, one trap each, by the kind of trap."""

from tests.graph.traps import (  # noqa: F401  (each adds its cases)
    attention,
    control_flow,
    convolutional,
    functional,
    not_zero,
    patterns,
    published,
    random_networks,
    recurrent,
    reshapes,
    sharing,
    statistics,
    unusual_code,
    written,
)
from tests.graph.traps._base import CASES, Case, Head, conv
from tests.graph.traps.attention import Attention

__all__ = ["CASES", "Attention", "Case", "Head", "conv"]
