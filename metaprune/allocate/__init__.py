"""Allocators: how much each axis may lose, one file each."""

from metaprune.allocate._base import ALLOCATORS, FLOOR, Allocator, Problem, Shares, Sizes
from metaprune.allocate.adapt import Adapt
from metaprune.allocate.ecoflap import Ecoflap
from metaprune.allocate.erk import Erk
from metaprune.allocate.fedtiny import Fedtiny
from metaprune.allocate.finercut import Finercut
from metaprune.allocate.flap import FlapGlobal
from metaprune.allocate.global_ import Global
from metaprune.allocate.global_mt import GlobalMinimumThreshold
from metaprune.allocate.isomorphic import Isomorphic
from metaprune.allocate.lamp import LampGlobal
from metaprune.allocate.laptop import Laptop
from metaprune.allocate.rd import RateDistortion
from metaprune.allocate.sap import Sap
from metaprune.allocate.uniform import Uniform

__all__ = [
    "ALLOCATORS",
    "FLOOR",
    "Adapt",
    "Allocator",
    "Ecoflap",
    "Erk",
    "Fedtiny",
    "Finercut",
    "FlapGlobal",
    "Global",
    "GlobalMinimumThreshold",
    "Isomorphic",
    "LampGlobal",
    "Laptop",
    "Problem",
    "RateDistortion",
    "Sap",
    "Shares",
    "Sizes",
    "Uniform",
]
