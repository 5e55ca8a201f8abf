"""Latency and memory of several files in one report; the first file is what the others are compared with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaprune.errors import ConfigError
from metaprune.export.session import open_session
from metaprune.measure.latency import Latency, latency
from metaprune.measure.memory import Memory, memory

_TIMING = 0.8  # share of the time that goes into latency, for the progress bar


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the files cost to run.

    Args:
        latency: Paired latency.
        memory: Size, load time and memory, one per file.
    """

    latency: Latency
    memory: tuple[Memory, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {"latency": self.latency.to_json(), "memory": [one.to_json() for one in self.memory]}


def bench(
    paths: Sequence[str | Path],
    *,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    threads: int = 1,
    rounds: int = 200,
    seconds: float = 2.0,
    limit_s: float = 60.0,
    repeats: int = 3,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Bench:
    """Time and weigh ONNX files in fresh processes.

    Args:
        paths: ONNX files, the one to compare with first.
        batch: Samples per call, where a file leaves its first dimension free.
        sizes: Sizes of the other free dimensions by name.
        threads: Threads per session.
        rounds: Rounds of calls at least.
        seconds: Time of measuring latency at least.
        limit_s: Time of measuring latency at most.
        repeats: Fresh processes per file for memory.
        seed: Of the order, the inputs and the bootstrap.
        progress: Called with the share that is done, 0 to 1.

    Raises:
        ConfigError: No file is given, or a number is out of its range.
        InputError: A file cannot be used, or does not run at these sizes. All are read before the first is timed.
        ResourceError: A process was killed or did not end.
    """
    if not paths:
        raise ConfigError("a benchmark needs at least one file, but none was given.")
    structures = [open_session(path, threads=1).structure for path in paths]

    def timing(share: float) -> None:
        if progress is not None:
            progress(_TIMING * share)

    speed = latency(
        paths,
        batch=batch,
        sizes=sizes,
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        limit_s=limit_s,
        seed=seed,
        progress=timing,
    )
    weights = []
    for index, (path, structure) in enumerate(zip(paths, structures), start=1):
        beside = [Path(path).parent / name for name in structure.external]
        weights.append(
            memory(path, beside=beside, batch=batch, sizes=sizes, threads=threads, repeats=repeats, seed=seed)
        )
        if progress is not None:
            progress(_TIMING + (1 - _TIMING) * index / len(structures))
    return Bench(latency=speed, memory=tuple(weights))
