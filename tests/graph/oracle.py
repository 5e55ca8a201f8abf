"""What the cut network must be, found without the code under test.

Every entry of a parameter is unlike all others, so the entries that are left in the cut network tell which positions
were kept along each dimension. Zeroing all others in a copy of the dense network gives the masked one.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from metaprune.edits import Keep
from metaprune.graph import Network
from metaprune.graph.axes import Axis
from metaprune.graph.surgery import sliced_copy
from metaprune.plans import Plan
from tests.graph.cases import Case

Kept = dict[str, list[np.ndarray]]  # for every parameter, the positions kept along each dimension


class WrongNetwork(AssertionError):
    """The cut network is not a part of the dense one, or does not compute what the masked one does."""


def tensors(item: Any) -> list[Tensor]:
    """All tensors of a nested result, in order."""
    if isinstance(item, Tensor):
        return [item]
    if isinstance(item, dict):
        item = list(item.values())
    elif hasattr(item, "__dataclass_fields__"):
        item = list(vars(item).values())
    return [tensor for entry in item for tensor in tensors(entry)] if isinstance(item, (list, tuple)) else []


def call(model: nn.Module, inputs: Any) -> list[Tensor]:
    """Run a model on example inputs of any form."""
    inputs = copy.deepcopy(inputs)  # a model may write into them
    if isinstance(inputs, dict):
        return tensors(model(**inputs))
    return tensors(model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs))


def named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones under every name."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def build(case: Case, seed: int = 0) -> tuple[nn.Module, Any]:
    """The dense network in evaluation mode with unique entries, and its inputs."""
    torch.manual_seed(seed)
    model = case.make().eval()
    generator = torch.Generator().manual_seed(seed + 1)
    seen: set[int] = set()
    with torch.no_grad():
        for name, tensor in named(model).items():
            leaf = name.rpartition(".")[2]
            if id(tensor) in seen or not tensor.is_floating_point() or leaf in case.keep or not tensor.numel():
                continue
            seen.add(id(tensor))
            if leaf == "weight_mask":  # of torch.nn.utils.prune
                continue
            count = tensor.numel()
            values = (torch.randperm(count, generator=generator).double() * 2 + 1) / count - 1  # within (-1, 1), unique
            values = values + 0.05 * torch.sin(3 * values)  # off the grid, where sums would be zero but for rounding
            if count == 1:
                values = torch.tensor([0.7])
            if tensor.dtype == torch.bfloat16:
                values = _all_bfloat16(generator)[:count]
            else:
                values = values * (3.0 / max(tensor[0].numel() if tensor.ndim > 1 else 4, 1)) ** 0.5
            if leaf in ("running_var", "original0") or leaf in case.never_zero:
                values = values.abs() + torch.arange(count) * 1e-3 + 0.5
            tensor.copy_(values.view_as(tensor))
            assert len(tensor.unique()) == count, name
    return model, case.inputs()


def _all_bfloat16(generator: torch.Generator) -> Tensor:
    """Numbers that bfloat16 tells apart, in random order."""
    positive = torch.arange(0x3D80, 0x3F00, dtype=torch.int16).view(torch.bfloat16)  # 1/16 to 1/2
    both = torch.cat([positive, -positive]).double()
    return both[torch.randperm(len(both), generator=generator)]


def by_hand(case: Case, slim: nn.Module) -> nn.Module:
    """A fresh dense module that got the cut parameters, without the code that cuts attributes."""
    model = case.make().eval()
    for name, tensor in named(slim).items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(tensor.detach().clone())
        else:
            module._buffers[leaf] = tensor.detach().clone()
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.normalized_shape = tuple(tensor.shape)
    return model


def random_plan(net: Network, seed: int, fraction: float = 0.3, axes: Iterable[Axis] | None = None) -> Plan:
    """Remove about a fraction of every prunable axis, at least one unit and never all."""
    random = np.random.default_rng(seed)
    edits = []
    for axis in net.axes if axes is None else axes:
        if axis.prunable:
            keep = max(1, min(axis.size - 1, round(axis.size * (1 - fraction))))
            kept = np.sort(random.choice(axis.size, keep, replace=False))
            edits.append(Keep(axis.name, axis.size, tuple(int(rank) for rank in kept)))
    return Plan(tuple(edits))


def kept_positions(dense: nn.Module, slim: nn.Module) -> Kept:
    """For every parameter and buffer, which positions are left along each dimension; None where it cannot be told.

    Raises:
        WrongNetwork: A tensor is no sub-tensor of its dense one.
    """
    before, after = named(dense), named(slim)
    constants = {name for name in after if name.startswith("constant_")}  # what a rewritten network holds besides
    held = {id(before[name]) for name in after if name in before}
    aliases = {name for name in before if name not in after and id(before[name]) in held}  # a rewritten network has one
    if set(before) != (set(after) - constants) | aliases:
        raise WrongNetwork(f"other names: {sorted(set(before) ^ set(after))}")
    found: Kept = {}
    for name, tensor in before.items():
        if name in aliases:
            continue
        full, part = tensor.detach().double().numpy(), after[name].detach().double().numpy()
        if after[name].dtype != tensor.dtype:
            raise WrongNetwork(f"{name} has become {after[name].dtype}")
        if full.ndim != part.ndim:
            raise WrongNetwork(f"{name} has {part.ndim} dimensions, not {full.ndim}")
        if full.shape == part.shape:
            if not np.array_equal(full, part, equal_nan=True):
                raise WrongNetwork(f"{name} kept its shape, but not its values")
            found[name] = [np.arange(size) for size in full.shape]
            continue
        values, where = np.unique(full, return_index=True)
        if len(values) != full.size or not tensor.is_floating_point():
            continue  # entries that repeat tell nothing, and integers may be positions, which change
        place = np.searchsorted(values, part)
        if (place >= len(values)).any() or not np.array_equal(values[place], part):
            raise WrongNetwork(f"{name} has entries that the dense one lacks")
        flat = np.unravel_index(where[place].ravel(), full.shape)  # numpy 2.4 errs on indices of more dimensions
        grid = [positions.reshape(part.shape) for positions in flat]
        kept = []
        for k in range(full.ndim):
            line = np.moveaxis(grid[k], k, 0).reshape(part.shape[k], -1)
            if not (line == line[:, :1]).all():
                raise WrongNetwork(f"{name} is no sub-tensor along dimension {k}")
            kept.append(line[:, 0])
            if not (np.diff(kept[-1]) > 0).all():
                raise WrongNetwork(f"{name} is reordered along dimension {k}: {kept[-1].tolist()}")
        found[name] = kept
    return found


def masked(model: nn.Module, kept: Kept, never_zero: Sequence[str] = ()) -> nn.Module:
    """The dense network, given as a copy to change, with all entries at removed positions set to zero."""
    with torch.no_grad():
        for name, tensor in named(model).items():
            for k, positions in enumerate(kept.get(name, [])):
                gone = np.setdiff1d(np.arange(tensor.shape[k]), positions)
                if len(gone):
                    leaf = name.rpartition(".")[2]
                    value = 1.0 if {leaf, f"{leaf}:{k}"} & set(never_zero) else 0.0
                    tensor.index_fill_(k, torch.from_numpy(gone), value)
    return model


def difference(wanted: Sequence[Tensor], seen: Sequence[Tensor]) -> float:
    """Largest absolute difference over the largest absolute output."""
    if [tensor.shape for tensor in wanted] != [tensor.shape for tensor in seen]:
        raise WrongNetwork("outputs have other shapes")
    scale = max((float(tensor.abs().max()) for tensor in wanted if tensor.numel()), default=0.0)
    worst = 0.0
    for a, b in zip(wanted, seen):
        if a.dtype == torch.bool or not a.is_floating_point():
            worst = max(worst, float(not torch.equal(a, b)))
        elif a.numel():
            if not bool(a.isfinite().all()):
                raise WrongNetwork("the masked network is not finite, so nothing can be compared")
            worst = max(worst, float((a - b).abs().max())) if bool(b.isfinite().all()) else float("inf")
    return worst / scale if scale else worst


def colour(axes: Sequence[Axis]) -> list[list[Axis]]:
    """Prunable axes in groups that share no parameter dimension, so that a group can be cut at once."""
    groups: list[tuple[list[Axis], set[tuple[str, int]]]] = []
    for axis in axes:
        if not axis.prunable:
            continue
        for members, used in groups:
            if used.isdisjoint(axis.bindings):
                members.append(axis)
                used.update(axis.bindings)
                break
        else:
            groups.append(([axis], set(axis.bindings)))
    return [members for members, _ in groups]


def positions_of_units(
    net: Network, dense: nn.Module, *, prove_all: bool = True
) -> dict[str, dict[tuple[str, int], dict[int, list[int]]]]:
    """For every prunable axis and parameter dimension, the positions of each unit, learnt by removing one at a time.

    Args:
        net: The traced network.
        dense: Its module.
        prove_all: Cut every unit by `Network.apply`, which proves what it cuts; else the first of each group alone, and
            the others are sliced alike.

    Raises:
        UnsupportedModelError: A network without one of the units is refused.
    """
    learnt: dict[str, dict[tuple[str, int], dict[int, list[int]]]] = {}
    for group in colour(net.axes):
        for rank in range(max(axis.size for axis in group)):
            here = [axis for axis in group if rank < axis.size]
            keeps = (tuple(r for r in range(axis.size) if r != rank) for axis in here)
            plan = Plan(tuple(Keep(axis.name, axis.size, keep) for axis, keep in zip(here, keeps)))
            if prove_all or not rank:
                slim = net.apply(plan)
            else:
                slim = sliced_copy(net.model, net._layout, net._alive(plan.draft()), {})
            kept = kept_positions(dense, slim)
            claimed = set()
            for axis in here:
                for name, k in axis.bindings:
                    claimed.add((name, k))
                    if name in kept:
                        size = named(dense)[name].shape[k]
                        gone = np.setdiff1d(np.arange(size), kept[name][k]).tolist()
                        learnt.setdefault(axis.name, {}).setdefault((name, k), {})[rank] = gone
            for name, positions in kept.items():
                for k, line in enumerate(positions):
                    if len(line) < named(dense)[name].shape[k] and (name, k) not in claimed:
                        aliases = [other for other, tensor in named(dense).items() if tensor is named(dense)[name]]
                        if not any((other, k) in claimed for other in aliases):
                            raise WrongNetwork(f"{name} shrank along {k}, which no binding says")
    return learnt


def permuted(model: nn.Module, learnt: dict[tuple[str, int], dict[int, list[int]]], order: Sequence[int]) -> nn.Module:
    """The dense network, given as a copy to change, with the units of one axis in another order."""
    tensors_by_name = named(model)
    with torch.no_grad():
        for (name, k), units in learnt.items():
            index = np.arange(tensors_by_name[name].shape[k])
            for rank, other in enumerate(order):
                if len(units[rank]) != len(units[other]):
                    raise WrongNetwork(f"units {rank} and {other} have unlike shares of {name}, dimension {k}")
                index[units[rank]] = units[other]
            tensors_by_name[name].copy_(tensors_by_name[name].index_select(k, torch.from_numpy(index)))
    return model


def to_meta(model: nn.Module) -> nn.Module:
    """A copy on the meta device, tensors of plain attributes too."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in tensors(vars(module)):
            data = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            memo[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
    return copy.deepcopy(model, memo)


def counted_macs(model: nn.Module, inputs: Any) -> float:
    """Multiply-accumulates of a whole batch by torch's own counter, on meta tensors where the model runs on them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        try:
            call(to_meta(model), _meta(inputs))
        except Exception:
            counter.flop_counts.clear()
            with FlopCounterMode(display=False) as counter:
                call(model, inputs)
    return counter.get_total_flops() / 2


def _meta(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.to("meta")
    if isinstance(item, dict):
        return {key: _meta(entry) for key, entry in item.items()}
    return tuple(map(_meta, item)) if isinstance(item, (tuple, list)) else item


def footprint(model: nn.Module) -> dict[str, Any]:
    """Everything that tracing must leave as it was."""
    return {
        "state": {name: tensor.detach().clone() for name, tensor in named(model).items()},
        "identity": {
            name: (id(tensor), tensor.data_ptr(), tensor.requires_grad) for name, tensor in named(model).items()
        },
        "grads": {name: tensor.grad is None for name, tensor in named(model).items() if tensor.is_leaf},
        "modes": [module.training for module in model.modules()],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for module in model.modules()
        ],
        "plain": [
            {
                key: (type(item), repr(item))
                for key, item in vars(module).items()
                if type(item) in (int, float, str, bool, tuple, list)
            }
            for module in model.modules()
        ],
    }


def same_footprint(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in before:
        if key == "state":
            assert list(before[key]) == list(after[key])
            for name, tensor in before[key].items():
                assert torch.equal(tensor.nan_to_num(), after[key][name].nan_to_num()), f"{name} was changed"
        else:
            assert before[key] == after[key], f"{key} changed"
