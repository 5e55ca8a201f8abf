"""Gradients of the loss, one small group of samples after another."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from metaprune.criteria._base import Calibration
from metaprune.errors import ConfigError
from metaprune.graph import Axis, Entries, Network
from metaprune.modes import evaluating
from metaprune.task import Task, on_calibration_data


def free_weights(network: Network) -> dict[str, Tensor]:
    """The parameters that can have gradients, as leaves of their own; they share memory with those of the model."""
    return {
        name: parameter.detach().requires_grad_()
        for name, parameter in network.model.named_parameters()
        if parameter.is_floating_point()
    }


def gradients_of_groups(
    network: Network, calibration: Calibration, weights: Mapping[str, Tensor], size: int, samples: int | None = None
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Gradients of the mean loss of each group of `size` samples, in evaluation mode, for the first `samples`.

    Yields:
        How many samples are in the group (the last of a batch may have fewer), and the gradients by name.
    """
    assert calibration.batches is not None
    assert calibration.task is not None
    generator = calibration.generator()
    with evaluating(network.model), torch.enable_grad():
        for group in groups_of(calibration.batches(), size, samples):
            with on_calibration_data():
                loss = calibration.task.slope(bound(network, weights), group, generator)
            yield samples_in(group), _gradients(loss, weights, calibration.task)


def entry_changes(
    entries: Entries, calibration: Calibration, size: int, samples: int | None, of: Callable[[int, Tensor], Tensor]
) -> dict[str, Tensor]:
    """What groups of samples say of weight times gradient, entry by entry, added up and over all samples; float64.

    Args:
        entries: Of which weights.
        calibration: Gives the data and the task.
        size: Samples in a group.
        samples: How many in all; None for all that there are.
        of: What to add up, of the number of samples in a group and the products.
    """
    weights, seen = free_weights(entries.network), 0
    totals = {name: torch.zeros(entries.shapes[name], dtype=torch.float64) for name in entries.names}
    for count, gradients in gradients_of_groups(entries.network, calibration, weights, size, samples):
        for name in totals.keys() & gradients.keys():
            totals[name] += of(count, (weights[name].detach() * gradients[name]).double().cpu())
        seen += count
    return {name: total / max(seen, 1) for name, total in totals.items()}


def bound(network: Network, weights: Mapping[str, Tensor]) -> Any:
    """The network as a function, with these weights."""

    def model(*args: Any, **kwargs: Any) -> Any:
        return functional_call(network.model, dict(weights), args, kwargs)

    return model


def _gradients(loss: Tensor, weights: Mapping[str, Tensor], task: Task) -> dict[str, Tensor]:
    require_gradient(loss, task)
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}


def require_gradient(loss: Tensor, task: Task) -> None:
    """The loss hangs on the weights.

    Raises:
        ConfigError: It does not.
    """
    if not loss.requires_grad:
        raise ConfigError(f"the loss of task {type(task).__name__} must depend on the weights, but has no gradient.")


def gate_gradients(axis: Axis, signed: Mapping[tuple[str, int], Tensor]) -> Tensor:
    """Derivatives of the loss by gates on the units: one row a layer that reads them, or that makes them if none does.

    Args:
        axis: The axis.
        signed: Sums of weight times gradient over the slice of each unit, by binding, shape (units,) each.
    """
    read = [signed[binding] for binding in axis.consumers if binding in signed]
    if read:
        return torch.stack(read)
    made: dict[str, Tensor] = {}
    for (name, _), total_U in signed.items():
        module = name.rpartition(".")[0]
        made[module] = made.get(module, torch.zeros_like(total_U)) + total_U
    return torch.stack(list(made.values())) if made else torch.zeros(0, axis.size, dtype=torch.float64)


def samples_in(batch: Any) -> int:
    """How many samples a batch holds."""
    return next(len(item) for item in batch if isinstance(item, Tensor))


def groups_of(batches: Iterator[Any], size: int, samples: int | None = None) -> Iterator[Any]:
    """Batches cut along their first dimension; what is no tensor goes with every part.

    Args:
        batches: Tuples with tensors.
        size: Samples in a part.
        samples: How many in all; None for all that there are.
    """
    left = samples
    for batch in batches:
        length = samples_in(batch)
        length = length if left is None else min(length, left)
        for start in range(0, length, size):
            stop = min(start + size, length)
            yield tuple(item[start:stop] if isinstance(item, Tensor) else item for item in batch)
        left = None if left is None else left - length
        if left == 0:
            return
