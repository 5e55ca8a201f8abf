"""From weights in files to smaller weights in files, tensor by tensor: the network is never in memory.

What to cut follows from scores of the weights alone, added up file by file. That the cut is right is proved as ever
without numbers: the cut network is traced and makes the calls that were predicted. It is not run.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from metaprune.budget import Budget
from metaprune.criteria import CRITERIA, Criterion
from metaprune.errors import ConfigError, InputError, UnsupportedModelError, did_you_mean
from metaprune.files import make_folder, write_atomically
from metaprune.graph import Network, trace
from metaprune.graph.surgery import Cut, numbers_left
from metaprune.graph.trace import ExampleInputs
from metaprune.graph.twin import copy_with, named_tensors
from metaprune.pipeline import SCHEMA, Figures, figures, flatten_example, plan, timed
from metaprune.plans import Plan
from metaprune.shards import SHARD_BYTES, Entry, Shards, write_shards


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What :func:`prune_files` did.

    Args:
        plan: What was cut.
        network: The traced network, without weights.
        cut: The cut network, without weights, and how it was made.
        before: What the dense network costs.
        after: What the smaller one costs.
        files: All that was written.
        seconds: Time of each step.
    """

    plan: Plan
    network: Network
    cut: Cut
    before: Figures
    after: Figures
    files: tuple[Path, ...]
    seconds: Mapping[str, float]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Networks built inside hold no weights; their buffers are real, because constants decide what may be cut.

    >>> with parameters_on_meta():
    ...     layer = nn.BatchNorm2d(4)
    >>> layer.weight.is_meta, layer.running_mean.is_meta
    (True, False)
    """

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = nn.modules.module.register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        handle.remove()


def prune_files(
    model: nn.Module,
    example_inputs: ExampleInputs,
    weights: str | Path,
    folder: str | Path,
    budget: str | Budget,
    *,
    criterion: str | Criterion = "l2",
    allocator: str = "global",
    round_to: int | None = None,
    floor: float = 0.1,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    step: Callable[[str], None] = lambda description: None,
) -> Streamed:
    """Make a network smaller that may be larger than memory.

    Args:
        model: The network, best built under :func:`parameters_on_meta`; its own weights play no part.
        example_inputs: As for :func:`metaprune.trace`; only shapes and types count.
        weights: A ``.safetensors`` file, or a folder with one or with shards and their index.
        folder: Where the result goes, as ``Result.save`` writes it, so that :func:`metaprune.load` reads it. Tensors
            keep their types and names.
        budget: As for :func:`metaprune.plan`.
        criterion: One that reads weights alone.
        allocator: As for :func:`metaprune.plan`.
        round_to: Likewise.
        floor: Likewise.
        seed: Likewise.
        shard_bytes: Largest size of a file that holds more than one tensor, in bytes.
        step: Is told what begins.

    Raises:
        ConfigError: An argument does not fit.
        BudgetError: The budget cannot be reached.
        InputError: The weights do not fit the model, or are not finite.
        UnsupportedModelError: The network cannot be traced or cut without weights.
    """
    judge = CRITERIA[criterion]() if isinstance(criterion, str) else criterion
    if judge.needs:
        weighing = ", ".join(name for name in CRITERIA if not CRITERIA[name].needs)
        raise ConfigError(f"a criterion must read weights alone here, but {criterion!r} needs data. Give {weighing}.")
    seconds: dict[str, float] = {}
    with timed(seconds, "trace", step, "Tracing the network"):
        network = trace(_on_meta(model), example_inputs)
    stored = StoredWeights(Shards(weights), network)
    network.weights = stored
    with timed(seconds, "plan", step, "Choosing what to cut"):
        decided = plan(network, budget, criterion, allocator, round_to=round_to, seed=seed, floor=floor)
    with timed(seconds, "cut", step, "Cutting"):
        cut = network.cut(decided)
        entries = stored.entries_of(cut.module)
    with timed(seconds, "write", step, "Writing"):
        alive = network._alive(decided.draft())
        files = _write(Path(folder), network, decided, lambda name: stored.left(name, alive), entries, shard_bytes)
    before, after = figures(network, None, ()), figures(network, decided, ())
    content = {"schema": SCHEMA, "network": network.fingerprint, "before": asdict(before), "after": asdict(after)}
    content |= {"error_max": None, "streamed": True, "surgery": {"way": cut.way, "reason": cut.reason}}
    write_atomically(Path(folder) / "result.json", json.dumps({**content, "seconds": seconds}, indent=1).encode())
    return Streamed(
        plan=decided,
        network=network,
        cut=cut,
        before=before,
        after=after,
        files=(*files, Path(folder) / "result.json"),
        seconds=seconds,
    )


class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a network as they are in files, under the names that the trace gives them.

    Raises:
        InputError: They are not those of the network.
    """

    def __init__(self, shards: Shards, network: Network) -> None:
        self.shards, self.network = shards, network
        aliases = network._layout.trace.aliases
        self._stored = {aliases.get(name, name): name for name in reversed(list(shards))}
        self._first = {name: aliases.get(name, name) for name in shards}
        self._check(network)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.shards[self._stored[name]]
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"weights must be finite, but {self._stored[name]!r} in {self.shards.path} is not.")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def left(self, name: str, alive: Any) -> Tensor:
        """What is left of a tensor, by its name in the files."""
        return numbers_left(self.network._layout, alive, self._first[name], self[self._first[name]])

    def entries_of(self, slim: nn.Module) -> dict[str, Entry]:
        """Type and shape of every stored tensor in the cut network."""
        own = named_tensors(slim)
        lost = next((name for name in self.shards if self._first[name] not in own), None)
        if lost is not None:
            raise UnsupportedModelError(f"the cut network must have every stored tensor, but has no {lost!r}.")
        return {
            name: Entry(entry.dtype, tuple(own[self._first[name]].shape)) for name, entry in self.shards.entries.items()
        }

    def _check(self, network: Network) -> None:
        shapes = network.shapes
        persistent = {self._first.get(name, name) for name in network.model.state_dict()}
        aliases = network._layout.trace.aliases
        wanted = {aliases.get(name, name) for name in persistent if not name.endswith("num_batches_tracked")}
        for name in sorted(wanted - set(self._stored)):
            raise InputError(f"the weights in {self.shards.path} must hold {name!r} {shapes[name]}, but do not.")
        for name, entry in self.shards.entries.items():
            first = self._first[name]
            if first not in shapes:
                raise InputError(
                    f"{name!r} in {self.shards.path} must be in the model, but is not.{did_you_mean(name, shapes)}"
                )
            if entry.shape != shapes[first]:
                raise InputError(f"{name!r} in {self.shards.path} must be {shapes[first]}, but is {entry.shape}.")
            if self._stored[first] != name and not torch.equal(self.shards[name], self.shards[self._stored[first]]):
                raise InputError(
                    f"{self._stored[first]!r} and {name!r} are one weight in the model, but differ in "
                    f"{self.shards.path}."
                )


def _on_meta(model: nn.Module) -> nn.Module:
    """The same module if it holds no weights, else a copy that holds none."""
    if all(parameter.is_meta for parameter in model.parameters()):
        return model

    def replace(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            return tensor
        return nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)

    return copy_with(model, replace)[0]


def _write(
    folder: Path,
    network: Network,
    decided: Plan,
    read: Callable[[str], Tensor],
    entries: Mapping[str, Entry],
    shard_bytes: int,
) -> list[Path]:
    make_folder(folder)
    decided.save(folder / "plan.json")
    files = write_shards(folder, entries, read, shard_bytes=shard_bytes)
    kind, tensors = flatten_example(network.example_inputs)
    write_atomically(folder / "example.safetensors", save(tensors, {"kind": kind}))
    return [folder / "plan.json", *files, folder / "example.safetensors"]
