"""Meta-training: a population of trained networks, and a metanetwork that is fitted to it."""

from metaprune.metatrain.population import Member, Population
from metaprune.metatrain.recipe import MemberSpec, Recipe

__all__ = ["Member", "MemberSpec", "Population", "Recipe"]
