"""Edits: the changes that a plan is made of, one file each."""

from metaprune.edits.drop_block import DropBlock
from metaprune.edits.keep import Keep
from metaprune.edits.mask import Mask, best_of, n_of_m, parse_pattern, unstructured
from metaprune.edits.merge import Merge, input_means
from metaprune.edits.set_weight import SetWeight

__all__ = [
    "DropBlock",
    "Keep",
    "Mask",
    "Merge",
    "SetWeight",
    "best_of",
    "input_means",
    "n_of_m",
    "parse_pattern",
    "unstructured",
]
