"""What each family of ATen calls does to labels, one file per family."""

from metaprune.graph.rules import (
    attention,
    convolution,
    create,
    index,
    matmul,
    norm,
    pointwise,
    recurrent,
    reduce,
    shape,
    spatial,
)
from metaprune.graph.rules._base import OWN_RULES, RULES, find_rule, register_rule, rule

__all__ = ["OWN_RULES", "RULES", "find_rule", "register_rule", "rule"]

# Imported for the rules that they register.
_FAMILIES = (attention, convolution, create, index, matmul, norm, pointwise, recurrent, reduce, shape, spatial)
