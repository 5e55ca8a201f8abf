"""Shares from the shapes of weights alone."""

from dataclasses import dataclass
from math import prod

from metaprune.allocate._base import ALLOCATORS, Allocator, Problem, Sizes, Units
from metaprune.allocate._paths import by_share
from metaprune.graph import Axis


@ALLOCATORS.register("erk")
@dataclass(frozen=True, kw_only=True)
class Erk(Allocator):
    """Keep a share of each axis that is in proportion to the sum over the product of its weight's dimensions::

        share = min(1, c (n_in + n_out + k_h + k_w) / (n_in n_out k_h k_w))

    with one `c` for all axes, the largest that meets the limits: small layers lose little, large ones much. The weight
    of an axis is the largest that has it as a dimension. Scores only say which units leave.

    Source: Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020, arXiv:1911.11134, section 3
    (Erdos-Renyi-Kernel).
    """

    def _sizes(self, problem: Problem) -> Sizes:
        raw = {axis.name: density(problem.network, axis) for axis in problem.axes}
        least = min(raw.values())

        def shares(place: float) -> dict[str, float]:
            return {name: min(1.0, place * value / least) for name, value in raw.items()}

        return by_share(problem, shares)


def density(network: Units, axis: Axis) -> float:
    """The sum over the product of the dimensions of the largest weight that an axis is a dimension of."""
    shapes = [network.shapes[name] for name, _ in axis.bindings]
    shape = max(shapes, key=lambda sizes: (len(sizes) > 1, prod(sizes)))
    return sum(shape) / prod(shape)
