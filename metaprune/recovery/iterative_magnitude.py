"""Iterative magnitude pruning without rewinding: the smallest weights become zero in rounds, training goes on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from metaprune.edits import unstructured
from metaprune.errors import ConfigError
from metaprune.recovery._base import RECOVERIES, Context
from metaprune.recovery._training import Lesson, Trained, grown, keep_masks


@RECOVERIES.register("iterative_magnitude")
@dataclass(frozen=True, kw_only=True)
class IterativeMagnitude(Trained):
    """The smallest weights of all layers together become zero in rounds and stay so; training heals between.

    Exactly ``floor(share * entries)`` entries of all parameters of two dimensions or more that may change are zeroed in
    the end; of equal ones the first. The round of a step is known from the step alone, and the masks are part of the
    checkpoint. The course is that of :class:`~metaprune.recovery._training.Trained`, with all its options.

    Source: Han et al., Learning both Weights and Connections, arXiv:1506.02626, for the rounds and for training on
    where others rewind; Zhu and Gupta, To prune, or not to prune, arXiv:1710.01878, equation 1, for the cubic schedule.

    Args:
        share: Share of the entries that become zero, in [0, 1).
        rounds: Number of rounds, at least 1; the first is before the first step.
        until: Share of the training after which no round begins, in (0, 1].
        schedule: ``cubic`` (large rounds first) or ``linear``.
    """

    name: ClassVar[str] = "iterative_magnitude"

    share: float = 0.5
    rounds: int = 8
    until: float = 0.7
    schedule: Literal["cubic", "linear"] = "cubic"

    def rules(self) -> dict[str, tuple[str, bool]]:
        """Also those of the rounds."""
        return super().rules() | {
            "share": ("0 <= share < 1", 0 <= self.share < 1),
            "rounds": ("rounds >= 1", self.rounds >= 1),
            "until": ("0 < until <= 1", 0 < self.until <= 1),
            "schedule": ("schedule in (cubic, linear)", self.schedule in ("cubic", "linear")),
        }

    def check(self, model: nn.Module, context: Context) -> None:
        """Also: there is a weight to zero entries of."""
        super().check(model, context)
        if not any(parameter.requires_grad and parameter.ndim > 1 for parameter in model.parameters()):
            raise ConfigError(f"recovery {self.name!r} needs a weight of two dimensions or more that may change.")

    def share_after(self, step: int, steps: int) -> float:
        """Share of the entries that are zero while step `step` of `steps`, counted from 0, is made.

        >>> recipe = IterativeMagnitude(share=0.8, rounds=2, until=0.5)
        >>> [round(recipe.share_after(step, 8), 3) for step in range(8)]
        [0.7, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]
        """
        begun = min(self.rounds, 1 + math.floor(step * self.rounds / (self.until * steps)))
        return self.share * grown(self.schedule, begun / self.rounds)

    def lesson(self, model: nn.Module, context: Context) -> Lesson:
        """The loss of the task, under masks that narrow."""
        return _Narrowing(model, context, self)


class _Narrowing(Lesson):
    """Masks by name; what they took stays zero, and a new round takes more."""

    def __init__(self, model: nn.Module, context: Context, recipe: IterativeMagnitude) -> None:
        super().__init__(model, context)
        self.recipe, self.taken = recipe, -1.0
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1}
        self.weights: dict[str, nn.Parameter] = weights
        self.kept = {name: context.masks.get(name, p.new_ones(p.shape).bool()) for name, p in weights.items()}
        self.settle(0, 1)

    def settle(self, step: int, steps: int) -> None:
        """Take more where a round begins; keep what was taken at zero."""
        share = self.recipe.share if step >= steps else self.recipe.share_after(step, steps)
        if share > self.taken:
            scores = {
                name: weight.detach().abs().cpu().masked_fill(~self.kept[name].cpu(), -1)  # what is gone stays gone
                for name, weight in self.weights.items()
            }
            kept = unstructured(scores, share)
            self.kept = {name: kept[name] & self.kept[name].cpu() for name in kept}
            self.taken = share
        keep_masks(self.model, self.kept)

    def tensors(self) -> Mapping[str, Tensor]:
        """The masks."""
        return self.kept

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """As `tensors` gave them; whether a round begins at the next step, the count of them tells."""
        self.kept = dict(tensors)
        entries = sum(kept.numel() for kept in self.kept.values())
        gone = sum(int((~kept).sum()) for kept in self.kept.values())
        self.taken = gone / max(entries, 1)

    def finished(self) -> nn.Module:
        """The network, with the share of zeros noted."""
        entries = sum(kept.numel() for kept in self.kept.values())
        gone = sum(int((~kept).sum()) for kept in self.kept.values())
        self.notes.append(f"{gone} of {entries} weights are zero")
        return self.model
