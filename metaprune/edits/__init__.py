"""Edits: the changes that a plan is made of, one file each."""

from metaprune.edits.drop_block import DropBlock
from metaprune.edits.keep import Keep
from metaprune.edits.set_weight import SetWeight

__all__ = ["DropBlock", "Keep", "SetWeight"]
