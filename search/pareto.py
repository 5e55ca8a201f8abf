"""Fronts: what nothing else beats in every objective, and what it gains over the baselines.

Array suffixes: N trials, G objectives, all of them to be small.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


def dominates(losses_NG: Numbers) -> npt.NDArray[np.bool_]:
    """Whether each row beats each other one: nowhere worse, somewhere better; shape (N, N)."""
    no_worse = (losses_NG[:, None] <= losses_NG[None]).all(axis=2)
    return np.asarray(no_worse & ~no_worse.T)


def ranks(losses_NG: Numbers) -> npt.NDArray[np.int64]:
    """0 for the front, 1 for the front without these, and so on; shape (N,).

    >>> ranks(np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])).tolist()
    [0, 0, 1, 2]
    """
    beats_NN = dominates(losses_NG)
    ranks_N = np.full(len(losses_NG), -1, np.int64)
    for rank in range(len(losses_NG)):
        left = ranks_N < 0
        ranks_N[left & ~beats_NN[left].any(axis=0)] = rank
        if (ranks_N >= 0).all():
            break
    return ranks_N


def spread(losses_NG: Numbers) -> Numbers:
    """How far the neighbours of each row are, summed over the objectives; shape (N,).

    It is infinite at the ends, and below 0 for a row that equals one before it: who has the first gains nothing by it.

    >>> spread(np.array([[0.0, 2.0], [0.0, 2.0], [1.0, 1.0], [2.0, 0.0]])).tolist()
    [inf, -1.0, 2.0, inf]
    """
    rows_DG, first_D = np.unique(losses_NG, axis=0, return_index=True)
    distance_D = np.zeros(len(rows_DG))
    for column_D in rows_DG.T:
        order = np.argsort(column_D, kind="stable")
        width = column_D[order[-1]] - column_D[order[0]] or 1.0
        distance_D[order[[0, -1]]] = math.inf
        distance_D[order[1:-1]] += (column_D[order[2:]] - column_D[order[:-2]]) / width
    out_N = np.full(len(losses_NG), -1.0)
    out_N[first_D] = distance_D
    return out_N


def best(losses_NG: Numbers, count: int) -> list[int]:
    """The rows that are kept when only so many can be: by front, within the last one by spread; ascending."""
    if not len(losses_NG):
        return []
    ranks_N, spread_N = ranks(losses_NG), np.zeros(len(losses_NG))
    for rank in set(ranks_N.tolist()):
        spread_N[ranks_N == rank] = spread(losses_NG[ranks_N == rank])
    order = np.lexsort((np.arange(len(losses_NG)), -spread_N, ranks_N))
    return sorted(order[:count].tolist())


def unchanged(losses_NG: Numbers) -> int:
    """For how many of the last rows, in their order, the front of all before them has stayed as it was."""
    since = 0
    for row in range(len(losses_NG)):
        before = losses_NG[:row]
        improves = not (before <= losses_NG[row]).all(axis=1).any()
        since = 0 if improves else since + 1
    return since


def volume(losses_NG: Numbers, reference_G: Numbers) -> float:
    """The part of space below `reference_G` that some row beats: what a front is worth as one number.

    >>> volume(np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([3.0, 3.0]))
    3.0
    """
    inside_NG = losses_NG[(losses_NG < reference_G).all(axis=1)]
    if not len(inside_NG):
        return 0.0
    if losses_NG.shape[1] == 1:
        return float(reference_G[0] - inside_NG.min())
    # Slabs along the last objective: within each, the same rows count.
    inside_NG = inside_NG[np.argsort(inside_NG[:, -1], kind="stable")]
    heights = np.diff(np.append(inside_NG[:, -1], reference_G[-1]))
    return float(
        sum(
            height * volume(inside_NG[: row + 1, :-1], reference_G[:-1])
            for row, height in enumerate(heights.tolist())
            if height > 0
        )
    )


def progress(losses_NG: Numbers) -> list[float]:
    """What the front was worth after each row, as a share of what it is worth in the end.

    >>> progress(np.array([[3.0], [4.0], [1.0]]))
    [0.5, 0.5, 1.0]
    """
    if not len(losses_NG):
        return []
    low_G, high_G = losses_NG.min(axis=0), losses_NG.max(axis=0)
    scaled_NG = (losses_NG - low_G) / np.where(high_G > low_G, high_G - low_G, 1.0)
    rim_G = np.full(losses_NG.shape[1], 1.0 + 1.0 / len(losses_NG))  # the worst of an objective is worth something too
    found, front = [], np.empty((0, losses_NG.shape[1]))
    whole = volume(scaled_NG, rim_G)
    for row_G in scaled_NG:
        if not (front <= row_G).all(axis=1).any():
            front = np.vstack([front[~(row_G <= front).all(axis=1)], row_G])
            worth = round(volume(front, rim_G) / whole, 3)
        found.append(worth)
    return found


@dataclass(frozen=True, kw_only=True)
class Point:
    """One network that was evaluated.

    Args:
        key: Hash of what was evaluated.
        number: Of its trial.
        origin: Which baseline proposed it, or the sampler.
        fidelity: The rung.
        config: What was chosen.
        metrics: What was found.
        feasible: All limits hold.
        front: Nothing else of this rung is better in every objective.
        gains: By baseline: how much better it is in the first objective than that one at the same budget.
        sizes: What is left of every axis.
        finished_ms: When, in ms since 1970.
    """

    key: str
    number: int
    origin: str
    fidelity: str
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    feasible: bool
    front: bool = False
    gains: Mapping[str, float | None] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    finished_ms: int = 0

    def row(self) -> dict[str, Any]:
        """It as one flat row of plain data."""
        told = {"key": self.key, "trial": self.number, "origin": self.origin, "fidelity": self.fidelity}
        told |= {"feasible": self.feasible, "front": self.front, **self.config, **self.metrics}
        return told | {f"gain_over_{name}": gain for name, gain in self.gains.items()}


def as_csv(points: Sequence[Point], tested: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """One line a point.

    Args:
        points: In their order.
        tested: Further columns of some of them, by key.
    """
    rows = [point.row() | dict((tested or {}).get(point.key, {})) for point in points]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
