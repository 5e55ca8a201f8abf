"""Where the time of one file goes, node by node and module by module, as the runtime itself tells it.

The runtime rewrites a file before it runs it: several nodes become one, others are added. Of all that a file says names
stay longest, so those of files that metaprune writes begin with the path of their module (`node_name`). A node of the
runtime bears the name of one of its parts, or, where it runs on blocks of channels, that of its result.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metaprune.errors import ConfigError
from metaprune.measure.fresh import in_fresh_process
from metaprune.measure.latency import check_file
from metaprune.measure.quantity import Quantity

OTHER = "(other)"  # first part of the paths of what belongs to no module; a module has no brackets in its name

_SCRIPT = Path(__file__).with_name("_session_job.py")
_BLOCKED = "_nchwc"  # how the runtime names kernels that run on blocks of channels
_BEHIND_PATH = "/"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node, after the runtime has rewritten the file: several of the file may be one.

    Args:
        name: Its name, as the runtime tells it.
        operator: What it does.
        module: Path of the module that it runs for, empty for the network itself; None where its name tells none.
        time: Median time of a call in microseconds.
        share: Of the time of all nodes.
        blocked: It runs on blocks of channels, which needs sizes that fit them.
        inputs: Shapes of what it reads, weights included.
        outputs: Shapes of what it gives.
    """

    name: str
    operator: str
    module: str | None
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
            "module": self.module,
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
    file = check_file(path)
    job = {
        "kind": "profile",
        "paths": [str(file)],
        "batch": batch,
        "sizes": dict(sizes or {}),
        "threads": threads,
        "rounds": rounds,
        "seed": seed,
    }
    told = in_fresh_process(_SCRIPT, job, limit_s=limit_s)["nodes"]
    total = sum(float(np.median(node["us"])) for node in told) or 1.0
    source = _Source(file)
    return tuple(_node(node, total, source) for node in told)


def shares_by_module(nodes: Iterable[Node]) -> dict[str, float]:
    """Share of the time that each module takes, by path; what belongs to none is ``(other)`` and its operator.

    A kernel that does the work of several modules counts for the one that it is named after.
    """
    shares: dict[str, float] = {}
    for node in nodes:
        path = f"{OTHER}.{node.operator}" if node.module is None else node.module
        shares[path] = shares.get(path, 0.0) + node.share
    return shares


def node_name(module: str, name: str) -> str:
    """Name of a node of a file that tells its module.

    >>> node_name("layer1.conv", "node_conv2d"), node_name("", "node_add")
    ('layer1.conv/node_conv2d', 'node_add')
    """
    return f"{module}{_BEHIND_PATH}{name}" if module else name


def module_of(name: str) -> str:
    """The module in the name of a node of a file, the inverse of `node_name`.

    >>> module_of("layer1.conv/node_conv2d"), module_of("node_add")
    ('layer1.conv', '')
    """
    return name.rpartition(_BEHIND_PATH)[0]


class _Source:
    """The nodes of a file, by what a runtime may call them."""

    def __init__(self, file: Path) -> None:
        import onnx  # here alone in this room, which training needs too

        nodes = onnx.load(file, load_external_data=False).graph.node
        self._by_name = {node.name: node for node in nodes if node.name}
        self._by_result = {result: node for node in nodes for result in node.output}

    def module(self, name: str, operator: str) -> str | None:
        """Path of the module that a node of the runtime runs for."""
        node = self._by_name.get(name) or self._maker(name, operator)
        if node is None:
            longest = max((part for part in self._by_name if part in name), key=len, default=None)
            return None if longest is None else module_of(longest)
        return module_of(node.name)

    def _maker(self, result: str, operator: str) -> Any:
        """The last node that does `operator` on the way to a result, e.g. the convolution before an activation."""
        node = last = self._by_result.get(result)
        while node is not None and node.op_type != operator:
            node = next((self._by_result[port] for port in node.input if port in self._by_result), None)
        return node or last


def _node(told: Mapping[str, Any], total: float, source: _Source) -> Node:
    times_R = np.asarray(told["us"], float)
    low, high = np.percentile(times_R, [25, 75])
    median = float(np.median(times_R))
    name = told["name"].removesuffix(_BLOCKED)
    return Node(
        name=name,
        operator=told["operator"],
        module=source.module(name, told["operator"]),
        time=Quantity(value=median, unit="us", n=len(times_R), low=low, high=high, spread="quartiles of the calls"),
        share=median / total,
        blocked=told["name"].endswith(_BLOCKED),
        inputs=tuple(map(tuple, told["inputs"])),
        outputs=tuple(map(tuple, told["outputs"])),
    )
