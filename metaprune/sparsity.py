"""Deciding which single entries of weights become zero: the allocators of units, over the entries of weights.

(The module is not called ``sparsify``, because ``metaprune.sparsify`` is a function.)
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from metaprune.allocate import ALLOCATORS, Allocator, Problem, Shares, Sizes
from metaprune.budget import NONZEROS, Budget, entry_budget
from metaprune.criteria import CRITERIA, Calibration, Criterion, require_entrywise
from metaprune.edits import Mask, best_of
from metaprune.errors import BudgetError
from metaprune.graph import Entries, Network
from metaprune.methods import named
from metaprune.planning import CALIBRATION, Data, calibration_batches
from metaprune.plans import Plan
from metaprune.task import Task, resolve_task


def sparsify(
    network: Network,
    budget: str | Budget | None = None,
    criterion: str | Criterion = "l2",
    allocator: str | Allocator = "global",
    data: Data | None = None,
    loss: str | Task | Callable[..., Tensor] | None = None,
    seed: int = 0,
    *,
    pattern: str | None = None,
    floor: Shares = 0.0,
    ceiling: Shares = 1.0,
    calibration: int = CALIBRATION,
) -> Plan:
    """Decide which entries of weights become zero. Shapes stay, and so do biases and norms.

    Wanda is ``criterion="wanda", allocator="uniform", pattern="row"``; SparseGPT's choice is ``criterion="obs"``, and
    what it makes of the others the recovery ``reconstruct``; Global MT ``criterion="l1", allocator="global_mt"``. Where
    a score is a loss, the allocators compare weights by it; else by the scores themselves.

    Args:
        network: A traced network; modules that it freezes are left alone.
        budget: Share of the entries of all weights that may stay, ``"nonzeros=0.5"``, or their number.
        criterion: What an entry is worth: a registered name, or an instance. Entries of weights that it cannot score
            (of recurrent layers, where it reads activations) stay.
        allocator: How many each weight may lose: a registered name, or an instance.
        data: As for :func:`metaprune.plan`.
        loss: Likewise.
        seed: Likewise.
        pattern: ``any``: an entry competes with all of its weight. ``row``: with those of its output, as many of which
            stay in every row. ``N:4`` (the letter N): of every 4 side by side along the input as many stay as the
            budget allows that weight. ``2:4``: 2 of 4 in every weight, whatever the allocator. None means ``any``.
        floor: Smallest share of every weight that must stay; at least one entry (of each row, or of every M).
        ceiling: Largest share that may stay.
        calibration: Samples to look at.

    Returns:
        Masks. Of equal entries the first leave first.

    Raises:
        ConfigError: An argument does not fit, or the pattern does not divide a weight.
        BudgetError: The budget cannot be reached, or is one of units.
        InputError: The data cannot be used.
    """
    entries, limits = reachable_entries(network, budget, pattern, floor=floor, ceiling=ceiling)
    chosen = CRITERIA[criterion]() if isinstance(criterion, str) else criterion
    divide = ALLOCATORS[allocator]() if isinstance(allocator, str) else allocator
    require_entrywise(chosen)
    divide.check_units(entries)
    batches = None if data is None else calibration_batches(data, calibration, seed)
    seen = Calibration(batches, resolve_task(loss, network.model), seed)
    scores = {name: entries.grouped(name, score) for name, score in chosen.judge(entries, seen).scores.items()}
    problem = Problem(
        entries, _by_rank(scores, chosen.additive), limits, chosen.additive, floor, batches=batches, task=seen.task,
        seed=seed, ceiling=ceiling,
    )  # fmt: skip
    sizes = _fixed(entries, scores) if entries.pattern.kept else divide.sizes(problem)
    edits = tuple(
        Mask(axis.name, entries.ungrouped(axis.name, best_of(scores[axis.name], size)), _named(entries, size))
        for axis, size in zip(entries.axes, sizes.tolist(), strict=True)
        if size < axis.size
    )
    made_by = {
        "budget": str(entry_budget(budget, pattern)),
        "pattern": entries.pattern.text,
        "criterion": named(CRITERIA, chosen),
        "allocator": named(ALLOCATORS, divide),
        "floor": floor,
        "seed": seed,
        "calibration": calibration if chosen.needs or divide.needs else 0,
        NONZEROS: entries.cost(sizes)[NONZEROS],
        "entries": entries.cost()[NONZEROS],
        **({} if ceiling == 1 else {"ceiling": ceiling}),
        **network.traced_with,
    }
    return Plan(edits, network.fingerprint, made_by)


def reachable_entries(
    network: Network,
    budget: str | Budget | None,
    pattern: str | None,
    *,
    floor: Shares = 0.0,
    ceiling: Shares = 1.0,
) -> tuple[Entries, dict[str, float]]:
    """The entries of a network, and how many of them may stay; arguments as for :func:`sparsify`, which raises alike.

    Raises:
        ConfigError: The pattern does not divide a weight, or a number is out of range.
        BudgetError: The budget cannot be reached.
    """
    wanted = entry_budget(budget, pattern)
    if wanted is None:
        raise BudgetError(f"entries leave by a budget of their number, e.g. nonzeros=0.5, but it is {budget!r}.")
    entries = Entries(network, pattern or "any")
    limits = wanted.absolute(entries.cost())
    blank = {axis.name: torch.zeros(axis.size) for axis in entries.axes}
    asked = Problem(entries, blank, limits, floor=floor, ceiling=ceiling)
    fixed = _fixed(entries, blank)
    if entries.pattern.kept and not asked.fits(fixed):
        raise BudgetError(
            f"pattern {pattern} keeps {entries.cost(fixed)[NONZEROS]} entries, but the budget allows "
            f"{limits[NONZEROS]:.12g}. Leave the budget out, or take another pattern."
        )
    return entries, limits


def _by_rank(scores: dict[str, Tensor], additive: bool) -> dict[str, Tensor]:
    """What it is worth to keep one more entry in every group of a weight, the best first: added up, or the mean."""
    ranked = {name: score_GU.sort(dim=1, descending=True).values for name, score_GU in scores.items()}
    return {name: score_GU.sum(0) if additive else score_GU.mean(0) for name, score_GU in ranked.items()}


def _fixed(entries: Entries, scores: dict[str, Tensor]) -> Sizes:
    """The N of a pattern N:M, for every weight that has scores."""
    return np.array([entries.pattern.kept if axis.name in scores else axis.size for axis in entries.axes], np.int64)


def _named(entries: Entries, kept: int) -> str:
    """The pattern that a mask keeps to."""
    return f"{kept}:{entries.pattern.every}" if entries.pattern.every else ""
