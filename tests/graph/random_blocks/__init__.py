"""Blocks of random networks, what belongs together in one file. What a seed draws hangs on the order of these files."""

# isort: off
import tests.graph.random_blocks.convolutions
import tests.graph.random_blocks.linear
import tests.graph.random_blocks.pointwise
import tests.graph.random_blocks.joining
import tests.graph.random_blocks.shapes
import tests.graph.random_blocks.reductions
import tests.graph.random_blocks.attention
import tests.graph.random_blocks.rare  # noqa: F401

# isort: on
from tests.graph.random_blocks.base import BLOCKS

__all__ = ["BLOCKS"]
