"""What the network's output loses without a unit: measured, unit by unit."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metaprune.criteria._activations import outputs_of
from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.criteria._gradients import groups_of
from metaprune.edits import Keep
from metaprune.errors import ConfigError
from metaprune.graph import Axis, Network
from metaprune.graph.record import tensors_in
from metaprune.graph.verify import masked_copy
from metaprune.modes import evaluating
from metaprune.plans import Plan


@CRITERIA.register("distortion")
@dataclass(frozen=True, kw_only=True)
class Distortion(Criterion):
    """Mean squared change of the network's output without a unit, over the mean square of the output.

    The slow truth for one unit at a time: the whole network runs once a unit. Where statistics run over the axis
    (LayerNorm, softmax), the network is cut for it, so that nothing is approximated.

    Source: the distortion of Xu et al., Efficient Joint Optimization of Layer-Adaptive Weight Pruning, ICCV 2023,
    arXiv:2308.10438, equation 2, with a unit in place of a share of the weights.

    Args:
        samples: To run on, at least 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data"})
    additive: ClassVar[bool] = True
    samples: int = 64

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"`samples >= 1` must hold, but samples={self.samples}. 64 is a good start.")

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        assert calibration.batches is not None
        batches = list(groups_of(calibration.batches(), 1 << 30, self.samples))
        dense = _outputs(network, calibration, batches, network.model)
        scale = sum(float(out.square().sum()) for out in dense)
        scores = {}
        for axis in network.axes:
            if axis.prunable:
                worth = []
                for rank in range(axis.size):
                    seen = _outputs(network, calibration, batches, _without(network, axis, rank))
                    change = sum(float((a - b).square().sum()) for a, b in zip(dense, seen, strict=True))
                    worth.append(change / max(scale, 1e-300))
                scores[axis.name] = torch.tensor(worth, dtype=torch.float64)
        return scores


def _without(network: Network, axis: Axis, rank: int) -> nn.Module:
    """The network without one unit: masked, or cut where masking changes statistics."""
    kept = tuple(other for other in range(axis.size) if other != rank)
    if not axis.exact:
        return network.apply(Plan((Keep(axis.name, axis.size, kept),)))
    alive = network.layout.alive({network.index(axis.name): np.array(kept)})
    return masked_copy(network.model, network.layout, alive, {})


def _outputs(network: Network, calibration: Calibration, batches: list[Any], model: nn.Module) -> list[Tensor]:
    """All tensors of numbers that the network returns, float64."""
    with evaluating(model), torch.no_grad():
        found = [tensors_in(outputs_of(network, calibration, batch, model)) for batch in batches]
    return [tensor.double() for tensors in found for tensor in tensors if tensor.is_floating_point()]
