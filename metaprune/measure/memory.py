"""What an ONNX file costs to keep: its size, its load time, and the memory that a process grows by when it runs it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metaprune.errors import ConfigError
from metaprune.measure.fresh import in_fresh_process
from metaprune.measure.latency import check_file
from metaprune.measure.quantity import Quantity

_SCRIPT = Path(__file__).with_name("_session_job.py")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Size and memory of one file.

    Args:
        file: The file, as it was given.
        size: Bytes on disk, with the files it refers to.
        load: Time to a ready session in ms, the file being in the page cache.
        base: Resident memory of the process before the file, in bytes; None outside Linux.
        peak: Growth of the peak of resident memory by loading and one call, in bytes; None outside Linux.
        note: What could not be measured, and why; empty if nothing.
        runtime: Name and version of the runtime.
    """

    file: str
    size: Quantity
    load: Quantity
    base: Quantity | None
    peak: Quantity | None
    note: str
    runtime: str

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain data."""
        return {
            "file": self.file,
            "size": self.size.to_json(),
            "load": self.load.to_json(),
            "base": None if self.base is None else self.base.to_json(),
            "peak": None if self.peak is None else self.peak.to_json(),
            "note": self.note,
            "runtime": self.runtime,
        }


def memory(
    path: str | Path,
    *,
    beside: Sequence[str | Path] = (),
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    threads: int = 1,
    repeats: int = 3,
    limit_s: float = 120.0,
    seed: int = 0,
) -> Memory:
    """Weigh one file in fresh processes.

    Args:
        path: The ONNX file.
        beside: Other files that it reads (external data); they count in the size.
        batch: Samples per call, where the file leaves its first dimension free.
        sizes: Sizes of the other free dimensions by name.
        threads: Threads of the session; each has its own arena.
        repeats: Fresh processes; the median of them is reported, with the smallest and the largest.
        limit_s: Time limit of one process in seconds.
        seed: Of the inputs.

    Raises:
        ConfigError: `repeats` is below 1.
        InputError: The file is missing, is no ONNX, or does not run at these sizes.
        ResourceError: A process was killed, most likely for memory, or did not end.
    """
    if repeats < 1:
        raise ConfigError(f"`repeats` must be at least 1, but it is {repeats}.")
    file = check_file(path)
    job = {
        "kind": "memory",
        "paths": [str(file)],
        "batch": batch,
        "sizes": dict(sizes or {}),
        "threads": threads,
        "seed": seed,
    }
    answers = [in_fresh_process(_SCRIPT, job, limit_s=limit_s) for _ in range(repeats)]
    told = all(answer["base_bytes"] is not None and answer["peak_bytes"] is not None for answer in answers)
    size = file.stat().st_size + sum(Path(other).stat().st_size for other in beside)
    return Memory(
        file=str(path),
        size=Quantity(value=size, unit="bytes", n=1, spread="exact"),
        load=_over_repeats([answer["load_ms"] for answer in answers], "ms"),
        base=_over_repeats([answer["base_bytes"] for answer in answers], "bytes") if told else None,
        peak=_over_repeats([answer["peak_bytes"] - answer["base_bytes"] for answer in answers], "bytes")
        if told
        else None,
        note="" if told else "resident memory: not measured, it is read from /proc, which only Linux has",
        runtime=answers[0]["runtime"],
    )


def _over_repeats(values: Sequence[float], unit: str) -> Quantity:
    return Quantity(
        value=float(np.median(values)),
        unit=unit,
        n=len(values),
        low=float(min(values)),
        high=float(max(values)),
        spread="smallest to largest of the repeats",
    )
