"""Cut little by little from the dense network to the planned one, and train all the way."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from metaprune.edits import DropBlock, Keep, Mask, SetWeight
from metaprune.plans import Plan
from metaprune.recovery._base import RECOVERIES, Context, Recovered
from metaprune.recovery._training import Trained, Training, grown

if TYPE_CHECKING:
    from metaprune.graph import Network


@RECOVERIES.register("gradual")
@dataclass(frozen=True, kw_only=True)
class Gradual(Trained):
    """Starts again from the dense network, and makes the planned cut in small ones with training between them.

    Every one of `cuts` cuts takes a part of the units (and branches) that the plan removes: those of the least norm in
    the dense network first. After the last, with which masks come too, the network is the planned one. One schedule of
    the learning rate runs over the whole; momentum starts anew after each cut. Where nothing is known of the dense
    network and the plan, it is plain training. The course is that of
    :class:`~metaprune.recovery._training.Trained`, with all its options.

    Source: Adapt-Pruner (arXiv:2502.03460), interleaved pruning and training, for ``linear``; Zhu and
    Gupta, arXiv:1710.01878, equation 1, for ``cubic``. Differs from the first: the plan says where the cuts go.

    Args:
        cuts: Number of cuts, at least 1; the first is before the first step.
        until: Share of the training after which nothing is cut, in (0, 1].
        schedule: ``linear`` (equal cuts) or ``cubic`` (large ones first).
    """

    name: ClassVar[str] = "gradual"

    cuts: int = 10
    until: float = 0.7
    schedule: Literal["linear", "cubic"] = "linear"

    def rules(self) -> dict[str, tuple[str, bool]]:
        """Also those of the cuts."""
        return super().rules() | {
            "cuts": ("cuts >= 1", self.cuts >= 1),
            "until": ("0 < until <= 1", 0 < self.until <= 1),
            "schedule": ("schedule in (cubic, linear)", self.schedule in ("cubic", "linear")),
        }

    def stages(self, steps: int) -> Iterator[tuple[float, int]]:
        """Which share of what leaves is gone, and the step until which it is trained so.

        >>> list(Gradual(cuts=2, until=0.5).stages(8))
        [(0.5, 2), (1.0, 8)]
        """
        begins = [int(cut / self.cuts * self.until * steps) for cut in range(self.cuts)]
        for cut, end in enumerate([*begins[1:], steps], 1):
            if end > begins[cut - 1]:
                yield grown(self.schedule, cut / self.cuts), end

    def _recover(self, model: nn.Module, context: Context) -> Recovered:
        network, plan = context.network, context.plan
        if network is None or plan is None or not plan.edits:
            return Training(self, model, context).run()
        if context.folder is not None and not context.resume:
            for stale in context.folder.glob(f"{self.name}-*.safetensors"):  # of other work
                stale.unlink()
        assert context.train is not None
        steps = self.epochs * (len(context.train) // min(self.batch_size, len(context.train)))
        way = _Way(network, plan)
        trained: Training | None = None
        recovered: Recovered | None = None
        for share, until in self.stages(steps):
            now = context if until == steps else replace(context, masks={})
            made = way.next(share, recovered.model if recovered else None)
            trained = Training(self, made.to(context.device), now, until, trained)
            recovered = trained.run()
        assert recovered is not None
        return recovered


class _Way:
    """Networks between the dense one and the planned one, each cut from what the one before it has learnt."""

    def __init__(self, network: "Network", plan: Plan) -> None:
        self.network, self.plan = network, plan
        self.keep = plan.draft().keep
        self.order = _weakest_first(network, self.keep)
        self.dropped = [edit for edit in plan.edits if isinstance(edit, DropBlock)]
        self.before = Plan(tuple(edit for edit in plan.edits if isinstance(edit, SetWeight)))

    def next(self, share: float, trained: nn.Module | None) -> nn.Module:
        """The network in which that share of what leaves has left, with what the one before it has learnt."""
        values = {} if trained is None else self.network.spread(self.before, trained)
        keeps = (
            Keep(name, self.network.axis(name).size, tuple(sorted({*kept, *gone[round(share * len(gone)) :]})))
            for name, kept, gone in ((name, kept, self.order[name]) for name, kept in self.keep.items())
        )
        cuts = (*keeps, *self.dropped[: round(share * len(self.dropped))])
        given = self.before.edits if trained is None else tuple(SetWeight(name, t) for name, t in values.items())
        if share == 1:
            cuts = (*cuts, *(edit for edit in self.plan.edits if isinstance(edit, Mask)))
        self.before = Plan((*given, *cuts))
        return self.network.apply(self.before)


def _weakest_first(network: "Network", keep: Mapping[str, tuple[int, ...]]) -> dict[str, list[int]]:
    """Ranks that leave each axis, those of the least norm first."""
    sums = network.sum_over_units(network.weights, of=lambda entries: entries.double().square())
    order = {}
    for name, kept in keep.items():
        size = network.axis(name).size
        total_U = torch.zeros(size, dtype=torch.float64) + sum((part.total_U for part in sums[name]), Tensor([0.0]))
        ranked = torch.argsort(total_U, stable=True).tolist()
        order[name] = [rank for rank in ranked if rank not in set(kept)]
    return order
