"""Deciding what to cut: what units are worth, how many of each axis stay, in one round or in several."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from metaprune.allocate import ALLOCATORS, FLOOR, Allocator, Problem, Shares
from metaprune.budget import Budget, Limit, parse_budget
from metaprune.criteria import CRITERIA, Calibration, Criterion, MetanetScore, Verdict, metanet_edit, unit_scores
from metaprune.data import Dataset, Split
from metaprune.edits import DropBlock, Keep, SetWeight
from metaprune.errors import ConfigError, InputError
from metaprune.files import cache_folder
from metaprune.graph import Network
from metaprune.graph.twin import named_tensors
from metaprune.metanet import Metanet, PaperMetanet, load_checkpoint, read_blocks
from metaprune.methods import named
from metaprune.plans import Edit, Plan
from metaprune.recovery import Context, Recovery, resolve
from metaprune.rounds import in_rounds
from metaprune.task import Task, resolve_task

RoundTo = int | Mapping[str, int]
Data = Dataset | Split | Iterable[Any] | Callable[[], Iterator[Any]]

CALIBRATION = 2048  # samples that criteria and the re-estimation of norms look at
CALIBRATION_BATCH = 64


def plan(
    network: Network,
    budget: str | Budget,
    criterion: str | Criterion = "l2",
    allocator: str | Allocator = "global",
    metanet: str | None = None,
    round_to: RoundTo | None = None,
    data: Data | None = None,
    loss: str | Task | Callable[..., Tensor] | None = None,
    seed: int = 0,
    *,
    floor: Shares = FLOOR,
    ceiling: Shares = 1.0,
    calibration: int = CALIBRATION,
    rounds: int = 1,
    between: str | Recovery | Sequence[Recovery] | None = "recalibrate_norm",
) -> Plan:
    """Decide what to cut.

    Args:
        network: A traced network.
        budget: What it may cost, e.g. ``"macs=0.5"`` or ``"macs=40M,bytes=256KB"``.
        criterion: What a unit is worth: a registered name, or an instance.
        allocator: How much each axis may lose: a registered name, or an instance.
        metanet: A metanetwork that edits the network first, so that it is easier to prune: ``default`` or a file. Its
            scores are the criterion ``metanet``, which then comes from the same file (``l2`` for one that only edits).
        round_to: Sizes of channel and hidden axes are multiples of this; None means 1, or for a budget of time what
            this machine's vector units want. Or by kind of axis.
        data: A dataset (its training split is read), a split, batches, or a function that gives a fresh pass over them.
        loss: A task name, a task, or ``loss(outputs, targets)``; None means classification.
        seed: Draws the calibration samples, and all else that is random.
        floor: Smallest share of every axis that must stay; or by patterns of their names, ``{"layer1.*": 0.5}``.
        ceiling: Largest share that may stay, likewise.
        calibration: Samples to look at.
        rounds: Look again at what is left after each of so many parts of the way; a metanetwork edits in the first.
        between: What heals the network between two rounds, without training.

    Raises:
        ConfigError: An argument does not fit.
        BudgetError: The budget cannot be reached; the smallest cost that can is named.
        InputError: The data cannot be used.
    """
    budget = parse_budget(budget)
    network = with_times(network, budget)
    round_to = _alignment(budget) if round_to is None else round_to
    if isinstance(allocator, str):
        _ = ALLOCATORS[allocator]  # an unknown name is refused before anything is judged
    limits = reachable_limits(network, budget, floor=floor, round_to=round_to, ceiling=ceiling)
    if rounds == 1:
        judgement = judge(
            network, criterion, metanet, data, loss, seed, calibration=calibration, share=share_left(network, limits)
        )
        return allot(network, judgement, budget, allocator, round_to=round_to, floor=floor, ceiling=ceiling)
    if rounds < 1 or data is None:
        raise ConfigError(f"`rounds >= 1` must hold, and more than 1 need data, but rounds={rounds}. Give `data=`.")
    if budget.timed:
        raise ConfigError(
            f"a budget of time is met in one round, as networks between have no table, but rounds={rounds}. Give 1."
        )
    ways = resolve(between)
    context = context_of(network, data, loss, seed, calibration, _device_of(network))
    for way in ways:
        way.check(network.model, context)

    judges: list[Criterion] = []  # the one of the first round serves all

    def decide(left: Network, part: Mapping[str, float], floors: Mapping[str, float]) -> Plan:
        asked, editor, top = (judges[0], None, 1.0) if judges else (criterion, metanet, ceiling)
        there = share_left(left, part)
        seen = judge(left, asked, editor, data, loss, seed, calibration=calibration, share=there)
        judges[:] = [seen.judge]
        wanted = Budget(tuple(Limit(quantity, limit) for quantity, limit in part.items()))
        return allot(left, seen, wanted, allocator, round_to=round_to, floor=floors, ceiling=top)

    def heal(so_far: Plan) -> nn.Module:
        slim: nn.Module = network.apply(so_far)
        here = replace(context, plan=so_far, masks=network.masks(so_far))
        for way in ways:
            slim = way.recover(slim, here).model
        return slim.eval()

    found = in_rounds(network, limits, lowest_sizes(network, floor, round_to), rounds, decide, heal)
    told = {"budget": str(budget), "floor": floor, "rounds": rounds, "between": [way.name for way in ways]}
    return replace(found, made_by={**found.made_by, **told})


@dataclass(frozen=True, eq=False, kw_only=True)
class Judgement:
    """What the units of a network are worth, and what a metanetwork made of its weights; allocators go on from here.

    Args:
        criterion: As it was named.
        metanet: Likewise.
        judge: The criterion itself.
        verdict: What it says.
        edited: Parameters that the metanetwork changed, by name.
        seen: The calibration data and the task.
        calibration: Samples of it.
    """

    criterion: str | Criterion
    metanet: str | None
    judge: Criterion
    verdict: Verdict
    edited: Mapping[str, Tensor]
    seen: Calibration
    calibration: int


def judge(
    network: Network,
    criterion: str | Criterion = "l2",
    metanet: str | None = None,
    data: Data | None = None,
    loss: str | Task | Callable[..., Tensor] | None = None,
    seed: int = 0,
    *,
    calibration: int = CALIBRATION,
    share: float = 0.5,
) -> Judgement:
    """Score the units of a network; the arguments are those of :func:`plan`.

    Args:
        network: A traced network.
        criterion: What a unit is worth.
        metanet: A metanetwork that edits the network first.
        data: What is looked at.
        loss: What is to stay small.
        seed: Draws the calibration samples.
        calibration: Samples to look at.
        share: Part of the dense cost that is to be left, for metanetworks.

    Raises:
        ConfigError: An argument does not fit.
        InputError: The data cannot be used.
    """
    chosen = CRITERIA[criterion]() if isinstance(criterion, str) else criterion
    editor = None if metanet is None else load_checkpoint(metanet).metanet
    if metanet is not None and criterion == "metanet":
        chosen = CRITERIA["l2"]() if isinstance(editor, PaperMetanet) else MetanetScore(checkpoint=metanet)
    batches = None if data is None else calibration_batches(data, calibration, seed)
    seen = Calibration(batches, resolve_task(loss, network.model), seed, share)
    edited = {} if editor is None else _edited(network, editor, seen)
    verdict = chosen.judge(network.with_tensors(edited) if edited else network, seen)
    return Judgement(
        criterion=criterion, metanet=metanet, judge=chosen, verdict=verdict, edited=edited, seen=seen,
        calibration=calibration,
    )  # fmt: skip


def allot(
    network: Network,
    judgement: Judgement,
    budget: str | Budget,
    allocator: str | Allocator = "global",
    *,
    round_to: RoundTo = 1,
    floor: Shares = FLOOR,
    grid: float | None = None,
    ceiling: Shares = 1.0,
) -> Plan:
    """Decide what to cut by what the units are worth.

    Args:
        network: The network that was judged.
        judgement: What its units are worth.
        budget: What it may cost.
        allocator: How much each axis may lose: a registered name, or an instance.
        round_to: Sizes of channel and hidden axes are multiples of this.
        floor: Smallest share of every axis that must stay.
        grid: Sizes are multiples of this share of their axis, rounded up; None allows every size.
        ceiling: Largest share that may stay.

    Raises:
        ConfigError: An argument does not fit.
        BudgetError: The budget cannot be reached; the smallest cost that can is named.
    """
    budget, seen, verdict = parse_budget(budget), judgement.seen, judgement.verdict
    divide = ALLOCATORS[allocator]() if isinstance(allocator, str) else allocator
    limits = reachable_limits(network, budget, floor=floor, round_to=round_to, grid=grid, ceiling=ceiling)
    problem = Problem(
        network, verdict.scores, limits, judgement.judge.additive, floor, round_to, verdict.curves, seen.batches,
        seen.task, seen.seed, grid, ceiling,
    )  # fmt: skip
    kept = divide.allocate(problem)
    edits: tuple[Edit, ...] = tuple(SetWeight(name, tensor) for name, tensor in judgement.edited.items())
    edits += tuple(
        Keep(axis.name, axis.size, kept[axis.name])
        for axis in network.axes
        if axis.name in kept and 0 < len(kept[axis.name]) < axis.size
    )
    edits += _dropped(network, {name for name, ranks in kept.items() if not ranks})
    # A metanetwork reads what criteria say of the data.
    learnt = judgement.metanet is not None or isinstance(judgement.judge, MetanetScore)
    looked = judgement.judge.needs or divide.needs or (learnt and seen.batches is not None)
    made_by = {
        "budget": str(budget),
        "criterion": named(CRITERIA, judgement.criterion),
        "allocator": named(ALLOCATORS, allocator),
        "round_to": round_to,
        "floor": floor,
        "seed": seen.seed,
        "calibration": judgement.calibration if looked else 0,
        **({} if grid is None else {"grid": grid}),
        **({} if ceiling == 1 else {"ceiling": ceiling}),
        **({} if judgement.metanet is None else {"metanet": judgement.metanet}),
        **({} if verdict.additivity is None else {"additivity": round(verdict.additivity, 4)}),
        **network.traced_with,
    }
    return Plan(edits, network.fingerprint, made_by)


def share_left(network: Network, limits: Mapping[str, float]) -> float:
    """The part of the dense cost that limits leave, the smallest over their quantities, at most 1."""
    dense = network.cost()
    return min(min(limit / dense[quantity] for quantity, limit in limits.items()), 1.0)


def _dropped(network: Network, empty: set[str]) -> tuple[Edit, ...]:
    """One edit a residual branch of whose axes nothing is left."""
    ends = {op.index for name in empty for op in network.joins[name]}
    bound = {name for axis in empty for name, _ in network.axis(axis).bindings}
    gone = (block for block in network.blocks if block.join in ends and not bound.isdisjoint(block.parameters))
    return tuple(DropBlock(block.name) for block in gone)


def _edited(network: Network, editor: Metanet | PaperMetanet, calibration: Calibration) -> dict[str, Tensor]:
    """Parameters that a metanetwork changes, by name."""
    if not editor.edits:
        return {}
    reads = unit_scores(network, calibration, editor.shape.reads)
    return metanet_edit(editor, network, read_blocks(network.to_graph()), reads, calibration.share)


def with_times(network: Network, budget: str | Budget) -> Network:
    """The network with a table of this machine where a budget limits its time, else the network itself.

    The table is measured once, which takes minutes, and kept in the cache.
    """
    if not parse_budget(budget).timed or network.cost().latency_ms is not None:
        return network
    from metaprune.export.latency_table import table_for  # brings onnxruntime, which no other budget needs

    return network.with_latency(table_for(network, cache_folder() / "latency"))


def _alignment(budget: Budget) -> int:
    """What sizes are multiples of where nobody says."""
    if not budget.timed:
        return 1
    from metaprune.export.devices import load_device

    return load_device("host").alignment


def reachable_limits(
    network: Network,
    budget: str | Budget,
    *,
    floor: Shares = FLOOR,
    round_to: RoundTo = 1,
    grid: float | None = None,
    ceiling: Shares = 1.0,
) -> dict[str, float]:
    """What a budget allows of each quantity, in absolute numbers, if some allocation can meet it.

    Args:
        network: A traced network.
        budget: As for :func:`plan`.
        floor: Likewise.
        round_to: Likewise, at least 1.
        grid: As for :func:`allot`.
        ceiling: As for :func:`plan`.

    Raises:
        ConfigError: A number is out of range, or the network has no axis that may be cut.
        BudgetError: It is no budget, or one that cannot be reached; the smallest cost that can is named.
    """
    dense = network.cost()
    limits = parse_budget(budget).absolute(dense.known)
    if not any(axis.prunable for axis in network.axes):
        why = "all must stay. `metaprune inspect` says why" if network.axes else "it has no parameters"
        raise ConfigError(f"the network must have a prunable axis, but {why}.")
    # The problem refuses what cannot be reached.
    Problem(network, _blank(network), limits, floor=floor, round_to=round_to, grid=grid, ceiling=ceiling)
    return limits


def lowest_sizes(network: Network, floor: Shares = FLOOR, round_to: RoundTo = 1) -> dict[str, int]:
    """Fewest units that must stay of each axis that may be cut; arguments as for :func:`plan`."""
    problem = Problem(network, _blank(network), {}, floor=floor, round_to=round_to)
    return {axis.name: int(problem.levels(axis)[0]) for axis in problem.axes}


def _blank(network: Network) -> dict[str, Tensor]:
    return {axis.name: torch.zeros(axis.size) for axis in network.axes if axis.prunable}


def _device_of(network: Network) -> torch.device:
    return next((tensor.device for tensor in named_tensors(network.model).values()), torch.device("cpu"))


def calibration_batches(data: Data, samples: int, seed: int) -> Callable[[], Iterator[Any]]:
    """A function that gives a fresh pass over the same calibration batches.

    Samples of a split are augmented as they are in training, because what a network remembers of its training samples
    is not what it makes of new ones: the norms of an uncut ResNet-20, re-estimated on plain training images, cost 2.5
    points on CIFAR-10, and none on augmented ones.

    Args:
        data: A dataset (its training split), a split, batches, or such a function.
        samples: How many samples of a split; batches are taken as they are.
        seed: Chooses the samples of a split.

    Raises:
        ConfigError: `samples` is below 1.
        InputError: There is no batch, or one holds no tensor.
    """
    if samples < 1:
        raise ConfigError(f"`calibration >= 1` must hold, but it is {samples}.")
    if isinstance(data, (Dataset, Split)):
        split = data.train if isinstance(data, Dataset) else data
        chosen = split.subset(min(samples, len(split)), seed)
        return lambda: chosen.batches(CALIBRATION_BATCH, shuffle=torch.Generator().manual_seed(seed), augment=True)
    if callable(data):
        return lambda: map(_as_batch, data())
    batches = [_as_batch(batch) for batch in data]
    if not batches:
        raise InputError("data must give batches, but it gives none.")
    return lambda: iter(batches)


def _as_batch(batch: Any) -> Any:
    """A batch as a sequence that begins with a tensor; a tensor alone is made one."""
    batch = batch if isinstance(batch, (list, tuple)) else (batch,)
    if not batch or not isinstance(batch[0], Tensor):
        seen = type(batch[0]).__name__ if batch else "nothing"
        raise InputError(
            f"data must give batches whose first entry is a tensor, but the first entry of one is {seen}. Give tuples "
            "like (inputs, labels), or the inputs alone."
        )
    return batch


def context_of(
    network: Network,
    data: Data | None,
    loss: str | Task | Callable[..., Tensor] | None,
    seed: int,
    samples: int,
    device: torch.device,
) -> Context:
    """What recoveries of a network are given; arguments as for :func:`plan`, and the device that they compute on."""
    return Context(
        train=data.train if isinstance(data, Dataset) else data if isinstance(data, Split) else None,
        calibration=None if data is None else calibration_batches(data, samples, seed),
        task=resolve_task(loss, network.model),
        dense=network.model,
        network=network,
        device=device,
        seed=seed,
    )
