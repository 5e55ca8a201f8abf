"""Paired latency of ONNX files on this machine: which one is faster, by how much, and how sure that is.

Means lie on shared cores: of one file against itself, the ratio of means was seen off by a factor of two under load,
the median of paired ratios by 4 %. So every file is called once per round, in random order, in a fresh process that is
bound to one core; the ratio to the first file is taken within each round, and its median is reported. A second session
of the first file runs along (the A/A arm): what it deviates from 1 is the noise that no claim may hide in.

Legend: R rounds, A arms, B blocks of consecutive rounds, S bootstrap draws.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from metaprune.errors import ConfigError, InputError
from metaprune.measure.fresh import in_fresh_process
from metaprune.measure.host import Host, host
from metaprune.measure.quantity import Quantity

Verdict = Literal["faster", "slower", "no difference", "too noisy"]

_SCRIPT = Path(__file__).with_name("_session_job.py")
_BLOCK = 10  # rounds: long enough to carry what neighbours share (a burst of load), short enough to leave many blocks
_DRAWS = 1000
_SPREAD = "95 % bootstrap interval over processes and blocks"
_QUIET = 0.03  # an A/A arm that may be further off than this cannot carry "no difference"
_FLOOR = 0.01  # sessions of one file differ by up to 0.6 % through where their weights lie in memory


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Latency of one file, per call.

    Args:
        file: The file, as it was given.
        p50: Median in ms.
        p95: 95th percentile in ms.
        p99: 99th percentile in ms.
        minimum: Fastest call in ms.
        cpu: Mean processor time in ms; it does not count what other processes took.
    """

    file: str
    p50: Quantity
    p95: Quantity
    p99: Quantity
    minimum: Quantity
    cpu: Quantity

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain data."""
        numbers = {name: getattr(self, name).to_json() for name in ("p50", "p95", "p99", "minimum", "cpu")}
        return {"file": self.file, **numbers}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One file against the first.

    Args:
        file: The file, as it was given.
        ratio: Its latency as a multiple of the first file's: median of the paired ratios; 0.5 is twice as fast.
        cpu_ratio: The same from processor time, as a cross-check.
        verdict: What may be claimed.
        reason: Why, in one sentence.
    """

    file: str
    ratio: Quantity
    cpu_ratio: Quantity
    verdict: Verdict
    reason: str

    @property
    def speedup(self) -> float:
        """How many times as fast as the first file."""
        return 1 / self.ratio.value

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain data."""
        return {
            "file": self.file,
            "ratio": self.ratio.to_json(),
            "cpu_ratio": self.cpu_ratio.to_json(),
            "speedup": self.speedup,
            "verdict": self.verdict,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class Latency:
    """What one comparison of files has shown.

    Args:
        arms: One per file, in the order given.
        comparisons: One per file after the first.
        control: The A/A arm: the first file against a second session of itself.
        resolution: Deviation from 1 that the control cannot exclude; a smaller effect is not claimed.
        batch: Samples per call.
        threads: Threads per session.
        rounds: Rounds of single calls.
        processes: Fresh processes that the rounds come from.
        cores: The core that each process was bound to; None where it was not.
        steal_ticks: Clock ticks that the hypervisor took meanwhile, or None where they are not told.
        involuntary_switches: How often the core was taken away meanwhile, or None where it is not told.
        runtime: Name and version of the runtime.
        host: The machine.
    """

    arms: tuple[Arm, ...]
    comparisons: tuple[Comparison, ...]
    control: Quantity
    resolution: float
    batch: int
    threads: int
    rounds: int
    processes: int
    cores: tuple[int | None, ...]
    steal_ticks: int | None
    involuntary_switches: int | None
    runtime: str
    host: Host

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "arms": [arm.to_json() for arm in self.arms],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "control": self.control.to_json(),
            "resolution": self.resolution,
            "batch": self.batch,
            "threads": self.threads,
            "rounds": self.rounds,
            "processes": self.processes,
            "cores": list(self.cores),
            "steal_ticks": self.steal_ticks,
            "involuntary_switches": self.involuntary_switches,
            "runtime": self.runtime,
            "host": self.host.to_json(),
            "label": "measured",
        }


def latency(
    paths: Sequence[str | Path],
    *,
    batch: int = 1,
    sizes: Mapping[str, int] | None = None,
    threads: int = 1,
    rounds: int = 200,
    seconds: float = 2.0,
    limit_s: float = 60.0,
    processes: int = 4,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Latency:
    """Time the files against the first one.

    Args:
        paths: ONNX files; the first is what the others are compared with.
        batch: Samples per call, where a file leaves its first dimension free.
        sizes: Sizes of the other free dimensions by name, e.g. ``{"sequence": 64}``.
        threads: Threads per session; with one, each process is bound to the idlest core.
        rounds: Rounds at least, over all processes. Fewer than 200 give wide intervals.
        seconds: Time of measuring at least, over all processes.
        limit_s: Time of measuring at most, over all processes; slow files get fewer rounds.
        processes: Fresh processes to spread the rounds over: where things lie in memory differs between them.
        seed: Of the order, the inputs and the bootstrap.
        progress: Called with the share that is done, 0 to 1.

    Raises:
        ConfigError: A number is out of its range.
        InputError: A file is missing, is no ONNX, or does not run at these sizes.
        ResourceError: A process was killed or did not end.
    """
    _check_numbers(batch=batch, threads=threads, rounds=rounds, processes=processes, seconds=seconds, limit_s=limit_s)
    files = [check_file(path) for path in paths]
    if not files:
        raise ConfigError("a comparison needs at least one file, but none was given.")
    parts = []
    for index in range(processes):
        job = {
            "kind": "latency",
            "paths": [*map(str, files), str(files[0])],
            "batch": batch,
            "sizes": dict(sizes or {}),
            "threads": threads,
            "pin": threads == 1,
            "rounds": max(2 * _BLOCK, -(-rounds // processes)),
            "seconds": seconds / processes,
            "limit_s": limit_s / processes,
            "seed": seed + index,
        }

        def step(share: float, index: int = index) -> None:
            if progress is not None:
                progress((index + share) / processes)

        # Loading and warming up come on top of the measuring itself.
        parts.append(in_fresh_process(_SCRIPT, job, limit_s=2 * limit_s + 60, progress=step))
        step(1.0)
    return _report([str(path) for path in paths], parts, batch=batch, threads=threads, seed=seed)


def check_file(path: str | Path) -> Path:
    """The path, if there is a file with something in it.

    Raises:
        InputError: There is none.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(
            f"an ONNX file is needed, but {str(path)!r} is {'a folder' if file.is_dir() else 'not there'}."
        )
    if file.stat().st_size == 0:
        raise InputError(f"an ONNX file is needed, but {str(path)!r} is empty.")
    return file


def _check_numbers(**values: float) -> None:
    for name, value in values.items():
        least = 0 if name in ("seconds", "limit_s") else 1
        if not value >= least or value == 0:
            raise ConfigError(f"`{name}` must be {'above 0' if least == 0 else 'at least 1'}, but it is {value}.")


def _report(files: list[str], parts: list[dict[str, Any]], *, batch: int, threads: int, seed: int) -> Latency:
    wall_RA = np.concatenate([np.asarray(part["wall_ns"], float) for part in parts]) / 1e6
    cpu_RA = np.concatenate([np.asarray(part["cpu_ns"], float) for part in parts]) / 1e6
    draws_SR = _block_draws([len(part["wall_ns"]) for part in parts], np.random.default_rng(seed))
    control = _quantity(_median, wall_RA[:, -1] / wall_RA[:, 0], draws_SR, "x")
    assert control.low is not None
    assert control.high is not None
    resolution = max(abs(control.low - 1), abs(control.high - 1), _FLOOR)
    comparisons = []
    for index, file in enumerate(files[1:], start=1):
        ratio = _quantity(_median, wall_RA[:, index] / wall_RA[:, 0], draws_SR, "x")
        verdict, reason = judge(ratio, resolution)
        cpu_ratio = _quantity(_median, cpu_RA[:, index] / np.maximum(cpu_RA[:, 0], 1e-6), draws_SR, "x")
        comparisons.append(Comparison(file=file, ratio=ratio, cpu_ratio=cpu_ratio, verdict=verdict, reason=reason))
    return Latency(
        arms=tuple(_arm(file, wall_RA[:, a], cpu_RA[:, a], draws_SR) for a, file in enumerate(files)),
        comparisons=tuple(comparisons),
        control=control,
        resolution=resolution,
        batch=batch,
        threads=threads,
        rounds=len(wall_RA),
        processes=len(parts),
        cores=tuple(part["core"] for part in parts),
        steal_ticks=_total(parts, "steal_ticks"),
        involuntary_switches=_total(parts, "involuntary_switches"),
        runtime=parts[0]["runtime"],
        host=host(),
    )


def judge(ratio: Quantity, resolution: float) -> tuple[Verdict, str]:
    """What a ratio with its interval may claim, given what the A/A arm cannot exclude.

    >>> judge(Quantity(value=0.5, unit="x", n=200, low=0.48, high=0.52), resolution=0.01)[0]
    'faster'
    >>> judge(Quantity(value=0.99, unit="x", n=200, low=0.98, high=1.001), resolution=0.01)[0]
    'no difference'
    >>> judge(Quantity(value=0.9, unit="x", n=20, low=0.7, high=1.2), resolution=0.2)[0]
    'too noisy'
    """
    assert ratio.low is not None
    assert ratio.high is not None
    if ratio.high < 1 and ratio.value < 1 - resolution:
        return "faster", f"the interval lies below 1 and the effect above the noise of {resolution:.1%}"
    if ratio.low > 1 and ratio.value > 1 + resolution:
        return "slower", f"the interval lies above 1 and the effect above the noise of {resolution:.1%}"
    if max(resolution, ratio.high - 1, 1 - ratio.low) <= _QUIET:
        return "no difference", f"any effect is below {_QUIET:.0%}"
    if resolution > _QUIET:
        return "too noisy", f"the file against itself may be off by {resolution:.1%}; quieten the machine and repeat"
    return "too noisy", "the interval is too wide to tell; give more rounds"


def _block_draws(lengths: list[int], rng: np.random.Generator) -> NDArray[np.intp]:
    """Row indices of bootstrap samples, (S, R'): processes are drawn, and in each of them whole blocks.

    Neighbouring rounds share their load, and all rounds of a process share where things lie in memory.
    """
    drawn = []
    firsts, count = np.cumsum([0, *lengths[:-1]]), min(lengths) // _BLOCK
    for _ in lengths:
        process_S = rng.integers(len(lengths), size=_DRAWS)
        block_SB = (rng.random((_DRAWS, count)) * (np.asarray(lengths) // _BLOCK)[process_S, None]).astype(np.intp)
        drawn.append(firsts[process_S, None] + _BLOCK * block_SB)
    start_SB = np.concatenate(drawn, axis=1)
    return (start_SB[:, :, None] + np.arange(_BLOCK)).reshape(_DRAWS, -1)


def _arm(file: str, wall_R: NDArray[np.float64], cpu_R: NDArray[np.float64], draws_SR: NDArray[np.intp]) -> Arm:
    def percentile(q: float) -> Quantity:
        return _quantity(lambda values, axis: np.percentile(values, q, axis=axis), wall_R, draws_SR, "ms")

    return Arm(
        file=file,
        p50=percentile(50),
        p95=percentile(95),
        p99=percentile(99),
        minimum=Quantity(value=float(wall_R.min()), unit="ms", n=len(wall_R)),
        cpu=_quantity(lambda values, axis: np.mean(values, axis=axis), cpu_R, draws_SR, "ms"),
    )


def _quantity(
    statistic: Callable[[NDArray[np.float64], int], Any],
    values_R: NDArray[np.float64],
    draws_SR: NDArray[np.intp],
    unit: str,
) -> Quantity:
    chunks = np.array_split(draws_SR, max(1, draws_SR.size // 2_000_000))  # bounds the memory, not the result
    drawn_S = np.concatenate([statistic(values_R[chunk], 1) for chunk in chunks])
    low, high = np.percentile(drawn_S, [2.5, 97.5])
    value = float(statistic(values_R[None], 1)[0])
    return Quantity(value=value, unit=unit, n=len(values_R), low=float(low), high=float(high), spread=_SPREAD)


def _median(values: NDArray[np.float64], axis: int) -> Any:
    return np.median(values, axis=axis)


def _total(parts: list[dict[str, Any]], key: str) -> int | None:
    values = [part[key] for part in parts]
    return None if None in values else sum(values)
