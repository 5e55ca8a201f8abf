"""Allocators: how much each axis may lose, one file each."""

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes
from metaprune.allocate.global_ import Global
from metaprune.allocate.rd import RateDistortion
from metaprune.allocate.uniform import Uniform

__all__ = ["ALLOCATORS", "Allocator", "Global", "Problem", "RateDistortion", "Sizes", "Uniform"]
