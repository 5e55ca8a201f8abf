"""One threshold for all axes of the same role."""

from dataclasses import dataclass

import numpy as np

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes, Units
from metaprune.allocate._paths import Numbers, by_threshold
from metaprune.graph import Axis, Network

Role = tuple[str, bool, frozenset[tuple[str, int, tuple[int, ...]]]]


@ALLOCATORS.register("isomorphic")
@dataclass(frozen=True, kw_only=True)
class Isomorphic(Allocator):
    """Rank the units of all axes of one role together, and remove the same share of every role.

    Axes have the same role if their units are of the same kind, and the same calls with kernels of the same extent make
    and read them: the insides of all residual blocks are one role, the residual streams another. Scores of different
    roles are never compared.

    Source: Fang et al., Isomorphic Pruning for Vision Models, ECCV 2024, arXiv:2407.04616.
    Differs from it: counts of calls do not matter, so that streams of different length are one role.
    """

    def _sizes(self, problem: Problem) -> Sizes:
        roles: dict[Role, list[Axis]] = {}
        for axis in problem.axes:
            roles.setdefault(role(problem.network, axis), []).append(axis)
        values: dict[str, Numbers] = {}
        for axes in roles.values():
            scores = np.concatenate([problem.scores[axis.name].numpy() for axis in axes])
            place = np.empty(len(scores))
            place[np.argsort(scores, kind="stable")] = (np.arange(len(scores)) + 0.5) / len(scores)
            ends = np.cumsum([axis.size for axis in axes])[:-1]
            values |= {axis.name: part for axis, part in zip(axes, np.split(place, ends), strict=True)}
        return by_threshold(problem, values)


def role(network: Units, axis: Axis) -> Role:
    """What the units of an axis are in a network: their kind, and the calls and kernels that make and read them.

    Of units that are no axes of a network (entries of weights) no calls are known, and kernels tell.
    """
    types = {name: place.type for name, place in network.places.places.items()} if isinstance(network, Network) else {}
    uses = ((types.get(name, ""), dim, network.shapes[name][2:]) for name, dim in axis.bindings)
    return axis.kind, axis.droppable, frozenset(uses)
