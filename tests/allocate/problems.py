"""Problems whose answers can be checked by hand."""

from typing import Any

import torch
from torch import Tensor, nn

from metaprune.allocate import ALLOCATORS, Problem
from metaprune.graph import Network, trace


def chain(*widths: int) -> Network:
    """Linear layers one after another; the hidden axes are named 0, 2, 4..."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for k in range(len(widths) - 1):
        layers += [nn.Linear(widths[k], widths[k + 1], bias=False), nn.ReLU()]
    return trace(nn.Sequential(*layers[:-1]).eval(), torch.randn(4, widths[0]))


def hidden(network: Network) -> list[str]:
    """Names of the axes that may be cut."""
    return [axis.name for axis in network.axes if axis.prunable]


def drawn(network: Network, seed: int = 0) -> dict[str, Tensor]:
    """Scores in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(network.axis(name).size, generator=generator).double() for name in hidden(network)}


def allocated(name: str, network: Network, scores: dict[str, Tensor], budget: float, **options: Any) -> dict[str, int]:
    """Units that an allocator keeps of every axis at a share of the multiply-accumulates."""
    given = {key: options.pop(key) for key in ("batches", "task", "seed", "floor", "additive") if key in options}
    asked = Problem(network, scores, {"macs": budget * network.cost().macs}, **{"floor": 0.0, **given})
    return {axis: len(kept) for axis, kept in ALLOCATORS[name](**options).allocate(asked).items()}
