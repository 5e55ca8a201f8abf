"""What any configuration of one network takes on one machine: measured for a few, fitted, and then known for thousands.

Kernels of a kind (the same call at as many positions) take time in proportion to their multiply-accumulates, once sizes
are rounded up to the blocks that the machine computes in; to what they read, once for every four blocks of what they
give, which the kernels of onnxruntime compute side by side; and to what they write. That they are called at all comes
on top. None of these prices is below 0, so that a smaller network is never predicted to be slower. They are fitted to
configurations of the network itself, exported and timed in pairs, and those of kinds alike (that add up over an axis,
or do not) are drawn to each other, for there are more of them than a few configurations can tell; the error on
configurations that a fit has not seen is part of the table.

Legend: N configurations, A axes, K kinds of kernels, F prices.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from metaprune.allocate import Problem
from metaprune.edits import Keep
from metaprune.errors import ConfigError, InputError
from metaprune.export.devices import load_device
from metaprune.export.example import as_example
from metaprune.export.to_onnx import DEFAULT_OPSET, draft, ladder, save
from metaprune.files import read_json, write_atomically
from metaprune.graph import Network
from metaprune.graph.cost import Kernel
from metaprune.measure.host import host
from metaprune.measure.latency import latency
from metaprune.plans import Plan

Sizes = NDArray[np.int64]
Numbers = NDArray[np.float64]

SCHEMA = 2
CONFIGURATIONS = 32
_FOLDS = 8
_ALIGNED = ("channel", "hidden")
_ABREAST = 4  # blocks of results that a kernel computes in one pass over what it reads
_LIKENESS = 0.1  # how dear it is, against errors of the fit, that a kind has a price of its own


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Milliseconds of a network at any sizes of its axes.

    Args:
        network: The network.
        block: Sizes are rounded up to multiples of this, as the machine does.
        prices: Milliseconds a unit of each entry of the description, shape (F,).
        error_mean: Mean error on configurations that the fit had not seen, as a share of their latency.
        error_max: Largest of these.
        configurations: How many were measured.
        machine: Processor and runtime that they were measured on.
    """

    network: Network
    block: int
    prices: Numbers
    error_mean: float
    error_max: float
    configurations: int
    machine: str

    def __call__(self, sizes_NA: Sizes) -> Numbers:
        """Milliseconds of configurations, (n, axes) to (n,)."""
        return np.asarray(_described(self.network, sizes_NA, self.block) @ self.prices)

    def levels(self, name: str) -> dict[int, float]:
        """Milliseconds with one axis at each of its legal sizes and all others whole."""
        axis = self.network.axis(name)
        step = self.block if axis.kind in _ALIGNED else 1
        sizes = sorted({*range(step, axis.size, step), axis.size})
        rows = np.repeat([[one.size for one in self.network.axes]], len(sizes), axis=0)
        rows[:, self.network.index(name)] = sizes
        return dict(zip(sizes, self(rows).tolist()))

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        content = {
            "schema": SCHEMA,
            "network": self.network.fingerprint,
            "block": self.block,
            "prices": self.prices.tolist(),
            "error_mean": self.error_mean,
            "error_max": self.error_max,
            "configurations": self.configurations,
            "machine": self.machine,
        }
        write_atomically(Path(path), json.dumps(content, indent=1).encode())


def load_table(path: str | Path, network: Network) -> LatencyTable:
    """Read what `LatencyTable.save` wrote.

    Raises:
        InputError: It is missing or damaged.
        ConfigError: It is that of another network.
    """
    content = read_json(Path(path), "a latency table")
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise InputError(f"{path} must hold a latency table of schema {SCHEMA}, but does not. Measure it again.")
    if content["network"] != network.fingerprint:
        raise ConfigError(
            f"a latency table is that of one network, but {path} is that of {content['network']}, and this is "
            f"{network.fingerprint}. Measure it again."
        )
    fields = {name: content[name] for name in ("block", "error_mean", "error_max", "configurations", "machine")}
    return LatencyTable(network=network, prices=np.asarray(content["prices"], float), **fields)


def measure_table(
    network: Network,
    *,
    configurations: int = CONFIGURATIONS,
    block: int | None = None,
    seconds: float = 20.0,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> LatencyTable:
    """Measure some configurations of a network on this machine, and fit the prices.

    Args:
        network: The traced network.
        configurations: How many, at least 8, the dense one included.
        block: What sizes are rounded up to; None for what this machine's vector units want.
        seconds: Time of measuring at least.
        seed: Draws them, and the order of calls.
        progress: Is told the share that is done.

    Raises:
        ConfigError: There are too few configurations, or no axis that may be cut.
        UnsupportedModelError: The network cannot be exported.
    """
    if configurations < _FOLDS:
        raise ConfigError(f"`configurations >= {_FOLDS}` must hold, but it is {configurations}.")
    wide = load_device("host").alignment if block is None else block
    tell = progress or (lambda share: None)
    sizes_NA = _drawn(network, configurations, wide, seed)
    with tempfile.TemporaryDirectory(prefix="metaprune-") as folder:
        files = []
        for k, sizes_A in enumerate(sizes_NA):
            files.append(_exported(network, sizes_A, Path(folder) / f"{k}.onnx"))
            tell(0.7 * (k + 1) / len(sizes_NA))
        times = latency(
            files,
            rounds=60,
            seconds=seconds,
            limit_s=30 * seconds,
            seed=seed,
            progress=lambda share: tell(0.7 + 0.3 * share),
        )
    dense_ms = times.arms[0].p50.value
    time_N = dense_ms * np.array([1.0, *(one.ratio.value for one in times.comparisons)])
    described_NF = _described(network, sizes_NA, wide)
    families_K = _families(network)
    error_N = _unseen(described_NF, time_N, families_K, seed)
    return LatencyTable(
        network=network,
        block=wide,
        prices=_fitted(described_NF, time_N, families_K),
        error_mean=float(error_N.mean()),
        error_max=float(error_N.max()),
        configurations=len(time_N),
        machine=f"{host().cpu}, {times.runtime}",
    )


def table_for(network: Network, folder: str | Path, **options: Any) -> LatencyTable:
    """The table of a network on this machine: read where it was measured before, else measured and kept.

    Args:
        network: The traced network.
        folder: Where tables are kept.
        **options: As for `measure_table`.
    """
    import onnxruntime

    decides = [SCHEMA, network.fingerprint, host().cpu, onnxruntime.__version__, sorted(options.items(), key=str)]
    name = hashlib.sha256(json.dumps(decides, default=str).encode()).hexdigest()[:24]
    path = Path(folder) / f"{name}.json"
    if path.is_file():
        return load_table(path, network)
    table = measure_table(network, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.save(path)
    return table


def _drawn(network: Network, count: int, block: int, seed: int) -> Sizes:
    """Configurations to measure, (N, A): the dense one, even shares, and axes drawn one by one."""
    free = [axis for axis in network.axes if axis.prunable]
    if not free:
        raise ConfigError("the network must have a prunable axis, but all must stay. `metaprune inspect` says why.")
    problem = Problem(network, {axis.name: _zeros(axis.size) for axis in free}, {}, floor=0.0, round_to=block)
    rng = np.random.default_rng(seed)
    rows = [problem.full, problem.smallest]
    for k in range(count - 2):
        around, spread = (k + 1) / (count - 1), 0.0 if k % 4 == 0 else 0.35
        shares = np.clip(around + spread * rng.uniform(-1, 1, len(free)), 0.05, 1.0)
        rows.append(problem.sizes({axis.name: share * axis.size for axis, share in zip(free, shares)}))
    return np.stack(rows)


def _zeros(size: int) -> Any:
    import torch

    return torch.zeros(size)


def _exported(network: Network, sizes_A: Sizes, path: Path) -> Path:
    """A file of one configuration; which units stay does not matter, so it is not proved."""
    keeps = tuple(
        Keep(axis.name, axis.size, tuple(range(size)))
        for axis, size in zip(network.axes, sizes_A.tolist())
        if size < axis.size
    )
    slim = network.apply(Plan(keeps, network.fingerprint)).eval()
    example = as_example(network.example_inputs)
    save(draft(slim, example, ladder(example)[0], DEFAULT_OPSET), path)
    return path


def _described(network: Network, sizes_NA: Sizes, block: int) -> Numbers:
    """What the prices are paid for, (N, F): work, reads and results of every kind, kernels, and the call itself."""
    aligned_A = np.array([axis.kind in _ALIGNED for axis in network.axes])
    rounded_NA = np.where(aligned_A, -(-sizes_NA // block) * block, sizes_NA)
    values_NV = np.concatenate([rounded_NA, sizes_NA > 0], axis=1).astype(np.float64)
    columns = {kind: k for k, kind in enumerate(_kinds(network))}
    work_NK, read_NK, made_NK = np.zeros((3, len(sizes_NA), len(columns)))
    calls_N = np.zeros(len(sizes_NA))
    for kernel in network.kernels:
        k, positions = columns[_kind(kernel, network)], max(kernel.outputs.values())
        work_N, made_N = _evaluated(kernel.macs, values_NV), _evaluated(kernel.outputs, values_NV)
        passes_N = np.ceil(made_N / positions / (_ABREAST * block))
        work_NK[:, k] += work_N
        read_NK[:, k] += work_N / np.maximum(made_N, 1) * positions * passes_N
        made_NK[:, k] += made_N
        calls_N += work_N > 0
    return np.column_stack([work_NK, read_NK, made_NK, calls_N, np.ones(len(sizes_NA))])


def _kind(kernel: Kernel, network: Network) -> tuple[Any, ...]:
    """What kernels of one price have in common; first its family: what is called, and whether it adds up over an axis.

    A depthwise convolution does not, and is another kernel than a full one with as many positions.
    """

    def degree(polynomial: Mapping[tuple[int, ...], float]) -> int:
        return max(sum(variable < len(network.axes) for variable in monomial) for monomial in polynomial)

    return (kernel.kind[0], degree(kernel.macs) > degree(kernel.outputs)), kernel.kind[1:]


def _kinds(network: Network) -> list[tuple[Any, ...]]:
    return sorted({_kind(kernel, network) for kernel in network.kernels}, key=str)


def _families(network: Network) -> NDArray[np.int64]:
    """Number of the family of each kind, (K,)."""
    return np.unique([str(family) for family, _ in _kinds(network)], return_inverse=True)[1]


def _evaluated(polynomial: Mapping[tuple[int, ...], float], values_NV: Numbers) -> Numbers:
    total_N = np.zeros(len(values_NV))
    for monomial, weight in polynomial.items():
        total_N += weight * values_NV[:, list(monomial)].prod(axis=1)
    return total_N


def _fitted(described_NF: Numbers, time_N: Numbers, families_K: NDArray[np.int64]) -> Numbers:
    """Prices at or above 0 of least relative error: one for every family, and what a kind costs beyond it.

    The latter are penalised by the square of the share of time that they explain.
    """
    kinds, rows_NF = len(families_K), described_NF / time_N[:, None]
    # Each kind has a price of its own for work, reads and results (O), and has a part in those of its family (S).
    member_OS = np.kron(np.eye(3), np.eye(families_K.max(initial=-1) + 1)[families_K])
    own_NO, rest_NR = rows_NF[:, : 3 * kinds], rows_NF[:, 3 * kinds :]
    columns_NC = np.concatenate([own_NO, own_NO @ member_OS, rest_NR], axis=1)
    scale_C = np.maximum(columns_NC.mean(axis=0), 1e-30)
    penalty_C = np.sqrt(_LIKENESS * len(time_N)) * (np.arange(len(scale_C)) < 3 * kinds)
    target = np.concatenate([np.ones(len(time_N)), np.zeros(len(scale_C))])
    found_C, _ = nnls(np.concatenate([columns_NC / scale_C, np.diag(penalty_C)]), target)
    own_O, family_S, rest_R = np.split(found_C / scale_C, [3 * kinds, len(found_C) - rest_NR.shape[1]])
    return np.concatenate([own_O + member_OS @ family_S, rest_R])


def _unseen(described_NF: Numbers, time_N: Numbers, families_K: NDArray[np.int64], seed: int) -> Numbers:
    """Relative error of every configuration, by a fit that has not seen it."""
    order = np.random.default_rng(seed).permutation(len(time_N))
    error_N = np.zeros(len(time_N))
    for fold in np.array_split(order, _FOLDS):
        rest = np.setdiff1d(order, fold)
        prices_F = _fitted(described_NF[rest], time_N[rest], families_K)
        error_N[fold] = np.abs(described_NF[fold] @ prices_F / time_N[fold] - 1)
    return error_N
