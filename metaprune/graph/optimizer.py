"""The optimizer of a cut network: what it has learnt of every parameter is sliced as the parameter is."""

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from metaprune.errors import ConfigError, UnsupportedModelError
from metaprune.graph.axes import Alive
from metaprune.graph.layout import Layout
from metaprune.graph.record import Value, tensors_in
from metaprune.graph.surgery import entries_left
from metaprune.graph.twin import named_tensors


def sliced_optimizer(
    optimizer: Optimizer, model: nn.Module, slim: nn.Module, layout: Layout, alive: Alive
) -> Optimizer:
    """An optimizer of the same class for the cut network, in the middle of the same training.

    Args:
        optimizer: That of the dense network; not changed.
        model: The dense network.
        slim: The cut one.
        layout: The axes of the dense one.
        alive: Which units stay.

    Raises:
        ConfigError: It steps a tensor that is no parameter of the network, or `slim` is another network.
        UnsupportedModelError: It keeps something that cannot be sliced; names it.
    """
    names = _names(optimizer, model, layout)
    own = named_tensors(slim)
    stepped = [tensor for tensor in _parameters(optimizer) if names[id(tensor)] in layout.trace.parameters]
    twins = {id(tensor): _twin(own, names[id(tensor)], tensor, layout, alive) for tensor in stepped}
    state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
    for tensor, entries in optimizer.state.items():
        name = names[id(tensor)]
        if id(tensor) not in twins:  # it left with a residual branch
            continue
        value = layout.trace.parameters[name]
        state[twins[id(tensor)]] = {
            key: _left(f"{key!r} of {name!r}", entry, tensor, value, layout, alive) for key, entry in entries.items()
        }
    groups = [
        {
            key: [twins[id(p)] for p in item if id(p) in twins] if key == "params" else copy.deepcopy(item)
            for key, item in group.items()
        }
        for group in optimizer.param_groups
    ]
    return _of_the_same_class(optimizer, groups, state)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def _names(optimizer: Optimizer, model: nn.Module, layout: Layout) -> dict[int, str]:
    """First name of every parameter that is stepped, by address."""
    aliases = layout.trace.aliases
    names = {id(tensor): aliases.get(name, name) for name, tensor in named_tensors(model).items()}
    for g, group in enumerate(optimizer.param_groups):
        for k, tensor in enumerate(group["params"]):
            if id(tensor) not in names:
                raise ConfigError(
                    f"the optimizer must step parameters of the traced network, but parameter {k} of its group {g}, "
                    f"of shape {tuple(tensor.shape)}, is none. Trace the very module that is in training."
                )
    return names


def _twin(own: dict[str, Tensor], name: str, tensor: Tensor, layout: Layout, alive: Alive) -> Tensor:
    value = layout.trace.parameters[name]
    wanted = tuple(dim.size if dim.labels_NK is None else layout.count(dim.labels_NK, alive) for dim in value.dims)
    twin = own.get(name)
    if twin is None or tuple(twin.shape) != wanted:
        seen = "has none of that name" if twin is None else f"has {tuple(twin.shape)}"
        raise ConfigError(
            f"{name!r} must be a parameter of shape {wanted} in the cut network, but it {seen}. Give the network that "
            "`apply` made from this plan."
        )
    return twin


def _left(what: str, entry: Any, parameter: Tensor, value: Value, layout: Layout, alive: Alive) -> Any:
    """One entry of the state: sliced if it has the parameter's shape, copied if it is a number or nothing was cut."""
    if isinstance(entry, Tensor) and entry.shape == parameter.shape:
        return entries_left(layout, alive, value, entry.detach()).clone()
    if not tensors_in(entry) or (isinstance(entry, Tensor) and entry.numel() == 1):
        return copy.deepcopy(entry)
    if entries_left(layout, alive, value, torch.empty_like(parameter, device="meta")).shape == parameter.shape:
        return copy.deepcopy(entry)
    shape = f"a tensor of shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else f"a {type(entry).__name__}"
    raise UnsupportedModelError(
        f"the state of an optimizer must be numbers, and tensors of the shape of their parameter, to be sliced, but "
        f"{what} is {shape} for a parameter of shape {tuple(parameter.shape)}. Start a new optimizer instead."
    )


def _of_the_same_class(optimizer: Optimizer, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> Optimizer:
    """As unpickling makes it, because a constructor need not take what the class calls its defaults."""
    other: Optimizer = type(optimizer).__new__(type(optimizer))
    other.__setstate__({"defaults": copy.deepcopy(optimizer.defaults), "state": state, "param_groups": groups})
    for name, item in vars(optimizer).items():  # flags of the class, e.g. that its step scales gradients itself
        if name not in vars(other) and isinstance(item, bool | int | float | str | None):
            vars(other)[name] = item
    return other
