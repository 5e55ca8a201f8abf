"""What is known of latencies: every measured ratio to the dense network, and a guess at those that were not measured.

Array suffixes: N measured networks, F features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metaprune.search.results import Results, digest

NAME = "latency"
_PRIOR = 1e-2  # weight of the guess that time follows the MACs, against one measurement


@dataclass(frozen=True)
class Table:
    """Measured ratios, by the sizes of the axes.

    Args:
        results: Where they lie.
    """

    results: Results

    def once(self, sizes: Mapping[str, int], find: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """The entry of these sizes: ``ratio`` and ``features``; measured by `find` if it is not there."""
        return self.results.once(f"{NAME}-{digest(dict(sizes))}", NAME, dict(sizes), find)

    def entries(self) -> list[dict[str, Any]]:
        """All entries, in the order of their names."""
        folders = sorted(self.results.folder.glob(f"{NAME}-*"))
        return [entry for folder in folders if (entry := self.results.get(folder.name, NAME)) is not None]

    def predicted(self, features_F: Sequence[float]) -> float:
        """A guess at the ratio from what was measured so far: least squares on shares of the cost.

        Before anything is measured it is the share of the MACs, the first feature; the dense network has ratio 1.

        >>> Table(Results(Path("/nowhere"))).predicted([0.5, 0.4, 0.7])
        0.5
        """
        entries = self.entries()
        rows_NF = np.array([entry["features"] for entry in entries] + [np.ones(len(features_F))])
        ratio_N = np.array([float(entry["ratio"]) for entry in entries] + [1.0])
        # What is fitted is the difference to the share of the MACs, which a constant and the features explain.
        design_NF = np.column_stack([np.ones(len(rows_NF)), rows_NF])
        asked_F = np.append(1.0, features_F)
        gram_FF = design_NF.T @ design_NF + _PRIOR * np.eye(design_NF.shape[1])
        weight_F = np.linalg.solve(gram_FF, design_NF.T @ (ratio_N - rows_NF[:, 0]))
        return max(0.0, float(features_F[0] + asked_F @ weight_F))
