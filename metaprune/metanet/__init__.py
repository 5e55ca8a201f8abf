"""Metanetworks: graph neural networks that read a network and make it easier to prune."""

from metaprune.metanet.blocks import Blocks, read_blocks, written
from metaprune.metanet.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, shipped
from metaprune.metanet.model import Metanet, Shape, with_less_memory
from metaprune.metanet.paper import PaperMetanet

__all__ = [
    "Blocks",
    "Checkpoint",
    "Metanet",
    "PaperMetanet",
    "Shape",
    "load_checkpoint",
    "read_blocks",
    "save_checkpoint",
    "shipped",
    "with_less_memory",
    "written",
]
