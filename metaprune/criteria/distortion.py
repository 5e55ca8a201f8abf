"""What the network's output loses without a unit: measured, unit by unit."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from metaprune.criteria._activations import outputs_of
from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.criteria._gradients import groups_of
from metaprune.edits import Keep
from metaprune.errors import ConfigError
from metaprune.graph import Axis, Network
from metaprune.graph.prefix import Prefix
from metaprune.graph.record import Op, tensors_in
from metaprune.graph.verify import masked_copy
from metaprune.modes import evaluating
from metaprune.plans import Plan


@CRITERIA.register("distortion")
@dataclass(frozen=True, kw_only=True)
class Distortion(Criterion):
    """Mean squared change of the network's output without a unit, over the mean square of the output.

    The slow truth for one unit at a time: the network runs once a unit, from the first layer on that has it. Where
    statistics run over the axis (LayerNorm, softmax), the network is cut for it, so that nothing is approximated.

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

    @torch.no_grad()
    def _score(self, network: Network, calibration: Calibration) -> Scores:
        assert calibration.batches is not None
        batches = list(groups_of(calibration.batches(), 1 << 30, self.samples))
        forwards = [partial(outputs_of, network, calibration, batch) for batch in batches]
        whole, prefix = (Prefix(forwards, network.layout.trace) for _ in range(2))
        dense = _outputs(whole, network.model)
        scale = sum(float(out.square().sum()) for out in dense)
        first = {axis.name: _first(network, axis) for axis in network.axes if axis.prunable}
        scores = {}
        for name, op in sorted(first.items(), key=lambda item: item[1].index):
            axis = network.axis(name)
            if axis.exact:
                with evaluating(network.model):
                    prefix.go_to(op, network.model)
            worth = []
            for rank in range(axis.size):
                seen = _outputs(prefix if axis.exact else whole, _without(network, axis, rank))
                change = sum(float((a - b).square().sum()) for a, b in zip(dense, seen, strict=True))
                worth.append(change / max(scale, 1e-300))
            scores[name] = torch.tensor(worth, dtype=torch.float64)
        return {name: scores[name] for name in first}


def _first(network: Network, axis: Axis) -> Op:
    """The first call that reads a parameter or buffer in which the axis has units."""
    trace = network.layout.trace
    numbers = {trace.parameters[network.aliases.get(name, name)].index for name, _ in axis.bindings}
    return next(op for op in trace.ops if not numbers.isdisjoint(op.inputs))


def _without(network: Network, axis: Axis, rank: int) -> nn.Module:
    """The network without one unit: masked, or cut where masking changes statistics."""
    kept = tuple(other for other in range(axis.size) if other != rank)
    if not axis.exact:
        return network.apply(Plan((Keep(axis.name, axis.size, kept),)))
    alive = network.layout.alive({network.index(axis.name): np.array(kept)})
    return masked_copy(network.model, network.layout, alive, {})


def _outputs(prefix: Prefix, model: nn.Module) -> list[Tensor]:
    """All tensors of numbers that the network returns, float64."""
    with evaluating(model):
        found = tensors_in(prefix.results(model))
    return [tensor.double() for tensor in found if tensor.is_floating_point()]
