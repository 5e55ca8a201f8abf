"""Let a bias stand for what leaves: the mean of a removed input, times its weights, is a constant of the layer."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from metaprune.errors import ConfigError, InputError
from metaprune.modes import evaluating
from metaprune.plans import EDITS, Draft, Edit
from metaprune.task import Batch, Task

if TYPE_CHECKING:
    from metaprune.graph import Network


@EDITS.register("merge")
@dataclass(frozen=True, eq=False)
class Merge(Edit):
    """The mean of the inputs that a plan removes from a layer, times their weights, goes into its bias.

    Whatever units the other edits of the plan remove, the mean of the layer's output over the samples that `mean` was
    taken from stays what it was (for a convolution that pads with zeros: away from the border). Where the layer has no
    bias but is read by a BatchNorm alone, the running mean of that takes it; where there is neither, the layer gets a
    bias, which the cost of the plan counts.

    Source: FLAP (An et al., Fluctuation-based Adaptive Structured Pruning, arXiv:2312.11983).

    Args:
        weight: The weight that reads, by its name in the state dict.
        mean: Mean of each of its inputs, one a position of the dimension that is added up.
    """

    kind: ClassVar[str] = "merge"
    weight: str
    mean: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Merge) and self.weight == other.weight and torch.equal(self.mean, other.mean)

    def __hash__(self) -> int:
        return hash((self.weight, tuple(self.mean.shape)))

    def check(self, network: "Network") -> str | None:
        """The weight reads units, `mean` fits it, and there is a bias or BatchNorm to take them."""
        name = network.aliases.get(self.weight, self.weight)
        if name not in network.shapes:
            return f"the network has no parameter or buffer {self.weight!r}."
        call, dim = network.linear_calls.get(name), network.input_dim(name)
        if call is None or dim is None or call.op.constants.get(("groups", None), 1) > 1:
            why = "it is not read as one product" if call is None or dim is None else "it reads in groups"
            return f"means can be merged behind a plain product, but {self.weight!r} gives none: {why}."
        if tuple(self.mean.shape) != (network.shapes[name][dim],) or not bool(self.mean.isfinite().all()):
            return (
                f"{self.weight!r} has {network.shapes[name][dim]} inputs and needs as many finite means, but there are "
                f"{tuple(self.mean.shape)}, {int((~self.mean.isfinite()).sum())} of them not finite."
            )
        path, _, leaf = self.weight.rpartition(".")
        layer = network.model.get_submodule(path)
        takes_one = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and leaf == "weight"
        if not call.intercept and not (takes_one and layer.bias is None):
            return (
                f"something must take the means that {self.weight!r} reads, but neither a bias nor a BatchNorm is "
                "behind it, and it lies in no layer of torch that could get one. Leave it out, or use `reconstruct`."
            )
        return None

    def apply(self, draft: Draft) -> None:
        """The last means given for a weight count."""
        draft.means[self.weight] = self.mean

    def to_json(self) -> dict[str, Any]:
        """The name; the means travel as a tensor."""
        return {"weight": self.weight}

    def tensors(self) -> dict[str, Tensor]:
        """The means."""
        return {"mean": self.mean}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Read back."""
        if set(data) != {"weight"} or set(tensors) != {"mean"}:
            raise KeyError(f"mean among the tensors {sorted(tensors)}")
        return cls(data["weight"], tensors["mean"])


def input_means(network: "Network", weights: Iterable[str], batches: Iterable[Batch], task: Task) -> dict[str, Tensor]:
    """Mean of every input of layers over all samples and positions, in float64.

    Args:
        network: The traced network; evaluated, not changed.
        weights: Weights of layers that are called as modules with the input alone.
        batches: What to run it on.
        task: How a batch is fed to it.

    Returns:
        Weight -> means (inputs,).

    Raises:
        ConfigError: A weight is not that of such a layer.
        InputError: There is no batch.
    """
    totals: dict[str, tuple[Tensor, int]] = {}

    def watch(name: str, dim: int) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            sums = inputs[0].detach().double().movedim(dim, -1).flatten(0, -2)
            before, count = totals.get(name, (torch.zeros(()), 0))
            totals[name] = (before + sums.sum(0).cpu(), count + len(sums))

        return look

    with ExitStack() as hooks, torch.no_grad(), evaluating(network.model):
        for name in weights:
            call = network.linear_calls.get(name)
            if call is None or "." not in name:
                raise ConfigError(f"{name!r} must be the weight of a layer that is called as a module, but is not.")
            module = network.model.get_submodule(name.rpartition(".")[0])
            hooks.callback(module.register_forward_pre_hook(watch(name, call.channels)).remove)
        for batch in batches:
            task.outputs(network.model, batch)
    if not totals:
        raise InputError("means are taken over at least one batch, but there is none.")
    return {name: total / count for name, (total, count) in totals.items()}
