"""Where the time of one file goes, node by node, as the runtime itself tells it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metaprune.errors import ConfigError
from metaprune.measure.fresh import in_fresh_process
from metaprune.measure.latency import check_file
from metaprune.measure.quantity import Quantity

_SCRIPT = Path(__file__).with_name("_session_job.py")
_BLOCKED = "_nchwc"  # how the runtime names kernels that run on blocks of channels


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node, after the runtime has rewritten the file: several of the file may be one.

    Args:
        name: Its name, as the runtime tells it.
        operator: What it does.
        time: Median time of a call in microseconds.
        share: Of the time of all nodes.
        blocked: It runs on blocks of channels, which needs sizes that fit them.
        inputs: Shapes of what it reads, weights included.
        outputs: Shapes of what it gives.
    """

    name: str
    operator: str
    time: Quantity
    share: float
    blocked: bool
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return {
            "name": self.name,
            "operator": self.operator,
            "time": self.time.to_json(),
            "share": self.share,
            "blocked": self.blocked,
            "inputs": [list(shape) for shape in self.inputs],
            "outputs": [list(shape) for shape in self.outputs],
        }


def profile(
    path: str | Path,
    *,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    threads: int = 1,
    rounds: int = 50,
    limit_s: float = 300.0,
    seed: int = 0,
) -> tuple[Node, ...]:
    """Time every node of a file in a fresh process.

    What is told includes the telling itself, a few microseconds a node: shares mean more than sums.

    Args:
        path: The ONNX file.
        batch: Samples per call, where the file leaves its first dimension free.
        sizes: Sizes of the other free dimensions by name.
        threads: Threads of the session.
        rounds: Calls to take the median of.
        limit_s: Time limit in seconds.
        seed: Of the inputs.

    Returns:
        The nodes in the order in which they run.

    Raises:
        ConfigError: `rounds` is below 1.
        InputError: The file is missing, is no ONNX, or does not run at these sizes.
        ResourceError: The process was killed or did not end.
    """
    if rounds < 1:
        raise ConfigError(f"`rounds` must be at least 1, but it is {rounds}.")
    job = {
        "kind": "profile",
        "paths": [str(check_file(path))],
        "batch": batch,
        "sizes": dict(sizes or {}),
        "threads": threads,
        "rounds": rounds,
        "seed": seed,
    }
    told = in_fresh_process(_SCRIPT, job, limit_s=limit_s)["nodes"]
    total = sum(float(np.median(node["us"])) for node in told) or 1.0
    return tuple(_node(node, total) for node in told)


def _node(told: Mapping[str, Any], total: float) -> Node:
    times_R = np.asarray(told["us"], float)
    low, high = np.percentile(times_R, [25, 75])
    median = float(np.median(times_R))
    return Node(
        name=told["name"].removesuffix(_BLOCKED),
        operator=told["operator"],
        time=Quantity(value=median, unit="us", n=len(times_R), low=low, high=high, spread="quartiles of the calls"),
        share=median / total,
        blocked=told["name"].endswith(_BLOCKED),
        inputs=tuple(map(tuple, told["inputs"])),
        outputs=tuple(map(tuple, told["outputs"])),
    )
