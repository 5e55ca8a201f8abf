"""Allocators that search: their import registers them."""

from metaprune.search.tyr import Tyr

__all__ = ["Tyr"]
