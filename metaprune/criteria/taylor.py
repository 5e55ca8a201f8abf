"""First-order Taylor expansion of the loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.errors import ConfigError
from metaprune.graph import Axis, Network
from metaprune.modes import evaluating
from metaprune.task import Task


@CRITERIA.register("taylor")
@dataclass(frozen=True, kw_only=True)
class Taylor(Criterion):
    """How much the loss changes, to first order, when what a unit feeds to its consumers is set to zero.

    For each layer that reads the unit, the change is the sum of weight times gradient over the weights that read it.
    Its absolute value is averaged over small groups of samples and added over the layers::

        score(u) = sum_layers mean_groups | sum_{w of layer reading u} w * dL/dw |

    Source: Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017,
    arXiv:1611.06440, equation 7, with the activation gates expressed through the weights that read them.
    Differs from it: the changes of several layers are added in absolute value, so that those of a residual stream,
    which is read by many, cannot cancel; and the layers' norms play no part. A unit that no weight reads (a dimension
    of query and key) is scored through the weights that make it.

    Args:
        group: Samples whose gradients are averaged before the absolute value is taken, at least 1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"data", "gradients"})
    additive: ClassVar[bool] = True
    group: int = 16

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ConfigError(f"`group >= 1` must hold, but group={self.group}. 16 is a good start.")

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        assert calibration.batches is not None
        assert calibration.task is not None
        weights = {
            name: parameter.detach().requires_grad_()
            for name, parameter in network.model.named_parameters()
            if parameter.is_floating_point()
        }
        axes = [axis for axis in network.axes if axis.prunable]
        totals = {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes}
        groups = 0
        with evaluating(network.model), torch.enable_grad():
            for batch in _groups(calibration.batches(), self.group):
                loss = calibration.task.step(_bound(network, weights), batch)
                gradients = _gradients(loss, weights, calibration.task)
                changes = network.sum_over_units({n: weights[n].detach() * g for n, g in gradients.items()})
                for axis in axes:
                    totals[axis.name] += _change(axis, {entry.binding: entry.total_U for entry in changes[axis.name]})
                groups += 1
        return {name: total_U / max(groups, 1) for name, total_U in totals.items()}


def _bound(network: Network, weights: dict[str, Tensor]) -> Any:
    def model(*args: Any, **kwargs: Any) -> Any:
        return functional_call(network.model, weights, args, kwargs)

    return model


def _gradients(loss: Tensor, weights: dict[str, Tensor], task: Task) -> dict[str, Tensor]:
    if not loss.requires_grad:
        raise ConfigError(f"the loss of task {type(task).__name__} must depend on the weights, but has no gradient.")
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}


def _change(axis: Axis, signed: dict[tuple[str, int], Tensor]) -> Tensor:
    """Absolute change of the loss by unit: over the layers that read it, or one of those that make it."""
    read = [signed[binding].abs() for binding in axis.consumers if binding in signed]
    if read:
        return torch.stack(read).sum(0)
    made: dict[str, Tensor] = {}
    for (name, _), total_U in signed.items():
        module = name.rpartition(".")[0]
        made[module] = made.get(module, torch.zeros_like(total_U)) + total_U
    layers = [total_U.abs() for total_U in made.values()]
    return torch.stack(layers).mean(0) if layers else torch.zeros(axis.size, dtype=torch.float64)


def _groups(batches: Iterator[Any], size: int) -> Iterator[Any]:
    """Batches cut along their first dimension; what is no tensor goes with every part."""
    for batch in batches:
        length = next(len(item) for item in batch if isinstance(item, Tensor))
        for start in range(0, length, size):
            yield tuple(item[start : start + size] if isinstance(item, Tensor) else item for item in batch)
