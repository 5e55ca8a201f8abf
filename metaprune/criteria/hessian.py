"""Curvature of the loss along units: optimal brain damage, the diagonal by Hutchinson's estimate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.criteria._gradients import bound, free_weights, groups_of, require_gradient, samples_in
from metaprune.errors import ConfigError
from metaprune.graph import Network
from metaprune.modes import evaluating
from metaprune.task import on_calibration_data


@CRITERIA.register("hessian")
@dataclass(frozen=True, kw_only=True)
class Hessian(Criterion):
    """How much the loss rises when a unit leaves, by its curvature alone, as if it were at a minimum::

        score(u) = |E_v[v_u (H v)_u]| / 2,   v of random signs,   H = second derivatives of the loss by gates on units

    A gate multiplies all weights that read a unit, so that what these weights do to each other counts too, which a
    diagonal over single weights leaves out. The estimate has no bias; its error falls with the root of the probes, of
    which each batch has its own. Axes that no weight reads are left out, and kept.

    Source: LeCun et al., Optimal Brain Damage, NIPS 1989, equation 4; diagonal as in Bekas et al., An estimator for the
    diagonal of a matrix, 2007, and for pruning Yu et al., Hessian-Aware Pruning, WACV 2022, arXiv:2101.08940.

    Args:
        probes: Random vectors a batch, at least 1.
        samples: How many samples are looked at, at least 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data", "gradients"})
    additive: ClassVar[bool] = True
    probes: int = 2
    samples: int = 1024

    def __post_init__(self) -> None:
        if self.probes < 1 or self.samples < 1:
            raise ConfigError(
                f"`probes >= 1` and `samples >= 1` must hold, but they are {self.probes} and {self.samples}."
            )

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        assert calibration.batches is not None
        axes = [axis for axis in network.axes if axis.prunable and axis.consumers]
        totals = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
        generator, seen = calibration.generator(), 0
        with evaluating(network.model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for batch in groups_of(calibration.batches(), 1 << 30, self.samples):
                gates, slopes = self._slopes(network, calibration, batch, list(totals))
                count = samples_in(batch)
                for _ in range(self.probes):
                    signs = [
                        (torch.randint(2, gate.shape, generator=generator) * 2 - 1).to(gate) for gate in gates.values()
                    ]
                    for name, sign, curve in zip(gates, signs, _along(slopes, gates, signs)):
                        totals[name] += count * (sign * curve).double().cpu()
                seen += count
        return {name: total_U.abs() / (2 * max(seen, 1) * self.probes) for name, total_U in totals.items()}

    def _slopes(
        self, network: Network, calibration: Calibration, batch: Any, names: list[str]
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """Gates that are open, and the derivatives of the loss by them, which can be derived again."""
        assert calibration.task is not None
        weights = free_weights(network)
        gates = {
            name: torch.ones(network.axis(name).size, device=_device(weights), requires_grad=True) for name in names
        }
        with on_calibration_data():
            loss = calibration.task.step(bound(network, gated(network, weights, gates)), batch)
        require_gradient(loss, calibration.task)
        found = torch.autograd.grad(loss, list(gates.values()), create_graph=True, allow_unused=True)
        return gates, tuple(
            torch.zeros_like(gate) if slope is None else slope for slope, gate in zip(found, gates.values())
        )


def _along(slopes: tuple[Tensor, ...], gates: Mapping[str, Tensor], signs: list[Tensor]) -> list[Tensor]:
    """The Hessian times a vector, one part a gate."""
    whole = torch.stack([(slope * sign).sum() for slope, sign in zip(slopes, signs)]).sum()
    if not whole.requires_grad:  # a loss of straight pieces
        return [torch.zeros_like(gate) for gate in gates.values()]
    try:
        found = torch.autograd.grad(whole, list(gates.values()), retain_graph=True, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"criterion 'hessian' needs second derivatives, but the network has none: {error}. Take 'fisher'."
        ) from error
    return [torch.zeros_like(gate) if part is None else part for part, gate in zip(found, gates.values())]


def gated(network: Network, weights: Mapping[str, Tensor], gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, those that read a unit multiplied by its gate."""
    out = dict(weights)
    values = network.layout.trace.parameters
    for axis, gate_U in gates.items():
        for name, dim in network.axis(axis).consumers:
            if name in out:
                ranks = network.layout.units_along(values[name].dims[dim], network.index(axis))
                assert ranks is not None
                open_U = torch.cat([gate_U, gate_U.new_ones(1)])  # the last one is for positions of other axes
                along = open_U[torch.from_numpy(ranks).to(gate_U.device)]
                out[name] = out[name] * along.view(-1, *[1] * (out[name].ndim - dim - 1))
    return out


def _device(weights: Mapping[str, Tensor]) -> torch.device:
    return next(iter(weights.values())).device
