"""Train little: norms, biases and low-rank updates of weights that keep the mask, and are merged at the end."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from metaprune.errors import ConfigError
from metaprune.recovery._base import RECOVERIES, Context
from metaprune.recovery._training import Lesson, Trained


@RECOVERIES.register("perp")
@dataclass(frozen=True, kw_only=True)
class Perp(Trained):
    """Everything is frozen but parameters of one dimension (norms, biases) and a low-rank update of every weight.

    A weight W of a linear layer or convolution, read as a matrix (out, in * kernel), becomes
    ``W + alpha / rank * (B A) * M``: A (rank, in * kernel) random, B (out, rank) zero at the start, M the mask of the
    plan. So the network starts as it is, what is masked stays zero whatever is learnt, and merging is the sum itself,
    exactly. AdamW; the rest of the course is that of :class:`~metaprune.recovery._training.Trained`.

    Source: PERP (Zimmer et al., Rethinking the Pruning-Retraining Paradigm, arXiv:2312.15230), MaskLoRA.
    Differs: the mask is the plan's, never guessed from zeros; a cosine instead of a linear decay.

    Args:
        lr: Highest learning rate, above 0.
        weight_decay: At least 0.
        warmup: As in the paper.
        rank: Rank of the updates, at least 0; at 0 only norms and biases are trained.
        alpha: Their scale, above 0.
    """

    name: ClassVar[str] = "perp"

    lr: float = 5e-4
    weight_decay: float = 0.0
    warmup: float = 0.1
    rank: int = 16
    alpha: float = 32.0

    def rules(self) -> dict[str, tuple[str, bool]]:
        """Also those of the updates."""
        return super().rules() | {
            "rank": ("rank >= 0", isinstance(self.rank, int) and self.rank >= 0),
            "alpha": ("0 < alpha < inf", 0 < self.alpha < math.inf),
        }

    def check(self, model: nn.Module, context: Context) -> None:
        """Also: there is a norm, a bias or a weight to update."""
        super().check(model, context)
        flat = any(parameter.requires_grad and parameter.ndim <= 1 for parameter in model.parameters())
        if not flat and not (self.rank and list(_weights(model))):
            raise ConfigError(
                "recovery 'perp' trains norms, biases and low-rank updates of linear layers and convolutions, but the "
                "network has none that may change. Use finetune."
            )

    def lesson(self, model: nn.Module, context: Context) -> Lesson:
        """The loss of the task, to few parameters."""
        return _Few(model, context, self)


class MaskedUpdate(nn.Module):
    """``W + scale * (B A) * M``.

    Args:
        weight: W.
        rank: Rank of ``B A``.
        scale: Its factor.
        kept: M, bool, in the shape of W; None for all.
        generator: Draws A.
    """

    def __init__(
        self, weight: Tensor, rank: int, scale: float, kept: Tensor | None, generator: torch.Generator
    ) -> None:
        super().__init__()
        out, inside = weight.shape[0], weight[0].numel()
        drawn = torch.rand(rank, inside, generator=generator) * 2 - 1
        self.a = nn.Parameter((drawn / math.sqrt(inside)).to(weight.device, weight.dtype))
        self.b = nn.Parameter(torch.zeros(out, rank, device=weight.device, dtype=weight.dtype))
        self.scale = scale
        mask = None if kept is None else kept.to(weight.device, weight.dtype)
        self.kept: Tensor | None
        self.register_buffer("kept", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that is used."""
        update = (self.scale * (self.b @ self.a)).view_as(weight)
        return weight + (update if self.kept is None else update * self.kept)


class _Few(Lesson):
    """The plain network is kept aside, and gets what was learnt at the end."""

    def __init__(self, model: nn.Module, context: Context, recipe: Perp) -> None:
        super().__init__(model, context)
        self.plain = copy.deepcopy(model)
        entries = sum(parameter.numel() for parameter in model.parameters())
        generator = torch.Generator().manual_seed(context.seed)
        updated = list(_weights(model)) if recipe.rank else []
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and parameter.ndim <= 1)
        for path, module in updated:
            name = f"{path}.weight" if path else "weight"
            weight = module.get_parameter("weight").detach()
            rank = min(recipe.rank, weight.shape[0], weight[0].numel())
            update = MaskedUpdate(weight, rank, recipe.alpha / rank, context.masks.get(name), generator)
            parametrize.register_parametrization(module, "weight", update)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.notes.append(f"trains {trained} numbers, {trained / max(entries, 1):.2%} of the {entries} parameters")

    def optimizer(self, recipe: Trained) -> Optimizer:
        """AdamW over what is trained."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, recipe.lr, weight_decay=recipe.weight_decay)

    def finished(self) -> nn.Module:
        """The plain network with what was learnt merged into its weights."""
        with torch.no_grad():
            for path, module in self.plain.named_modules():
                twin = self.model.get_submodule(path)
                for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                    tensor.copy_(getattr(twin, name))
        return self.plain


def _weights(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear layers and convolutions whose weight may change, by path; one that is tied to others is left as it is."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        layer = isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or type(module).__name__ == "Conv1D"
        if layer and isinstance(weight, nn.Parameter) and weight.requires_grad and uses[id(weight)] == 1:
            yield path, module
