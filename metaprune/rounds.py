"""Cutting in rounds: a part of the way, heal, look again at what is left.

What units are worth is said of the network as it is, and after half of the way it is another one. The plan that comes
out is a single one on the dense network, which is cut and healed once.
"""

import glob
from collections.abc import Callable, Mapping

from torch import nn

from metaprune.edits import DropBlock, Keep
from metaprune.graph import Network, trace
from metaprune.plans import Edit, Plan

Limits = Mapping[str, float]
Floors = Mapping[str, float]
Decide = Callable[[Network, Limits, Floors], Plan]


def in_rounds(
    network: Network,
    limits: Limits,
    floors: Mapping[str, int],
    rounds: int,
    decide: Decide,
    heal: Callable[[Plan], nn.Module],
) -> Plan:
    """A plan made in several rounds, the cost of each the same part of that of the one before.

    Args:
        network: The dense network.
        limits: Quantity of cost -> what it may be in the end.
        floors: Axis name -> fewest units that must stay.
        rounds: How many, at least 1.
        decide: Makes a plan for the network that is left, limits, and smallest shares of its axes by pattern of name.
        heal: The network that a plan leaves, at its best without training.

    Returns:
        One plan on the dense network, with what the plans of all rounds keep.
    """
    dense, here, whole = network.cost(), network, Plan((), network.fingerprint)
    for number in range(1, rounds + 1):
        now = here.cost()  # a round may have gone further than it was asked to
        part = {
            name: min(now[name], dense[name] * min(1.0, limit / dense[name]) ** (number / rounds))
            for name, limit in limits.items()
        }
        left = {axis.name: axis.size for axis in here.axes if axis.prunable}
        shares = {glob.escape(name): min(1.0, floors[name] / size) for name, size in left.items() if name in floors}
        whole = _after(network, whole, decide(here, part, shares))
        if number < rounds:
            here = trace(heal(whole), network.example_inputs, freeze=network.freeze or None, only=network.only or None)
    return whole


def _after(network: Network, first: Plan, then: Plan) -> Plan:
    """One plan on the dense network for two in turn; what is no cut (weights that were set) is of the first round."""
    kept = {edit.axis: edit.kept for edit in first.edits if isinstance(edit, Keep)}
    for edit in then.edits:
        if isinstance(edit, Keep):
            before = kept.get(edit.axis, range(edit.size))
            kept[edit.axis] = tuple(before[rank] for rank in edit.kept)
    source = first if first.edits or first.made_by else then
    edits: list[Edit] = [edit for edit in source.edits if not isinstance(edit, Keep | DropBlock)]
    dropped = dict.fromkeys(edit.block for plan in (first, then) for edit in plan.edits if isinstance(edit, DropBlock))
    edits += [Keep(name, network.axis(name).size, ranks) for name, ranks in kept.items()]
    return Plan((*edits, *map(DropBlock, dropped)), network.fingerprint, source.made_by)
