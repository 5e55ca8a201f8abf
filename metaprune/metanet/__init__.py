"""Metanetworks: graph neural networks that read a network and make it easier to prune."""

from metaprune.metanet.blocks import Blocks, read_blocks, written
from metaprune.metanet.checkpoint import SHAPES, Checkpoint, load_checkpoint, new_metanet, save_checkpoint, shipped
from metaprune.metanet.model import Metanet, Shape, with_less_memory
from metaprune.metanet.paper import PaperMetanet, PaperShape

__all__ = [
    "SHAPES",
    "Blocks",
    "Checkpoint",
    "Metanet",
    "PaperMetanet",
    "PaperShape",
    "Shape",
    "load_checkpoint",
    "new_metanet",
    "read_blocks",
    "save_checkpoint",
    "shipped",
    "with_less_memory",
    "written",
]
