"""Allocators that search: their import registers them."""

from metaprune.search.tas import Tas
from metaprune.search.tyr import Tyr

__all__ = ["Tas", "Tyr"]
