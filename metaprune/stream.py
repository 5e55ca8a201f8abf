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

from metaprune.allocate import FLOOR, Allocator, Shares
from metaprune.budget import Budget
from metaprune.criteria import CRITERIA, Criterion
from metaprune.errors import ConfigError, InputError, UnsupportedModelError, did_you_mean
from metaprune.files import make_folder, write_atomically
from metaprune.graph import Network, trace
from metaprune.graph.network import require_numbers
from metaprune.graph.select import Selection
from metaprune.graph.surgery import Cut, numbers_left
from metaprune.graph.trace import ExampleInputs
from metaprune.graph.twin import copy_with, named_tensors
from metaprune.methods import named
from metaprune.pipeline import SCHEMA, Figures, figures, flatten_example, timed
from metaprune.planning import RoundTo
from metaprune.planning import plan as decide
from metaprune.plans import Plan
from metaprune.shards import SHARD_BYTES, Entry, Shards, write_shards


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """What was cut, and the files that hold the rest.

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


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What is to be cut; nothing has been written.

    Args:
        plan: What is to be cut.
        network: The traced network, without weights.
        cut: The cut network, without weights, and how it was made.
        stored: The weights of the dense one.
        seconds: Time of each step.
    """

    plan: Plan
    network: Network
    cut: Cut
    stored: "StoredWeights"
    seconds: dict[str, float]

    def write(
        self,
        folder: str | Path,
        *,
        shard_bytes: int = SHARD_BYTES,
        step: Callable[[str], None] = lambda description: None,
    ) -> Streamed:
        """Write the smaller network as ``Result.save`` does, so that :func:`metaprune.load` reads it.

        Args:
            folder: Where it goes.
            shard_bytes: Largest size of a file that holds more than one tensor, in bytes.
            step: Is told what begins.

        Raises:
            InputError: Weights are not finite, or the folder cannot be written.
            ResourceError: The disk is full.
        """
        folder, network = Path(folder), self.network
        alive = network._alive(self.plan.draft())
        make_folder(folder)
        with timed(self.seconds, "write", step, "Writing"):
            entries = self.stored.entries_of(self.cut.module)
            files = write_shards(
                folder, entries, lambda name: self.stored.left(name, alive), shard_bytes=shard_bytes
            )  # fmt: skip
            self.plan.save(folder / "plan.json")
            kind, tensors = flatten_example(network.example_inputs)
            write_atomically(folder / "example.safetensors", save(tensors, {"kind": kind}))
        before, after = figures(network, None, ()), figures(network, self.plan, ())
        content = {"schema": SCHEMA, "network": network.fingerprint, "before": asdict(before), "after": asdict(after)}
        content |= {"error_max": None, "streamed": True, "surgery": self.cut.to_json()}
        content |= {"seconds": self.seconds}
        write_atomically(folder / "result.json", json.dumps(content, indent=1).encode())
        return Streamed(
            plan=self.plan,
            network=network,
            cut=self.cut,
            before=before,
            after=after,
            files=(*files, *(folder / name for name in ("plan.json", "example.safetensors", "result.json"))),
            seconds=self.seconds,
        )


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
    shard_bytes: int = SHARD_BYTES,
    **options: Any,
) -> Streamed:
    """Make a network smaller that may be larger than memory: :func:`choose`, then :meth:`Chosen.write`.

    Args:
        model: As for :func:`choose`.
        example_inputs: Likewise.
        weights: Likewise.
        folder: Where the result goes, as ``Result.save`` writes it.
        budget: As for :func:`choose`.
        shard_bytes: Largest size of a file that holds more than one tensor, in bytes.
        **options: As for :func:`choose`.
    """
    return choose(model, example_inputs, weights, budget, **options).write(folder, shard_bytes=shard_bytes)


def choose(
    model: nn.Module,
    example_inputs: ExampleInputs,
    weights: str | Path,
    budget: str | Budget,
    *,
    criterion: str | Criterion = "l2",
    allocator: str | Allocator = "global",
    round_to: RoundTo | None = None,
    floor: Shares = FLOOR,
    ceiling: Shares = 1.0,
    rounds: int = 1,
    seed: int = 0,
    freeze: Selection | None = None,
    only: Selection | None = None,
    step: Callable[[str], None] = lambda description: None,
) -> Chosen:
    """Decide what to cut from a network whose weights are in files.

    Args:
        model: The network, best built under :func:`parameters_on_meta`; its own weights play no part.
        example_inputs: As for :func:`metaprune.trace`; only shapes and types count.
        weights: A ``.safetensors`` file, or a folder with one or with shards and their index. What is written keeps
            their names and types.
        budget: As for :func:`metaprune.plan`.
        criterion: One that reads weights alone.
        allocator: As for :func:`metaprune.plan`.
        round_to: Likewise.
        floor: Likewise.
        ceiling: Likewise.
        rounds: Always 1, because there are no data to look at what is left.
        seed: Likewise.
        freeze: As for :func:`metaprune.trace`.
        only: Likewise.
        step: Is told what begins.

    Raises:
        ConfigError: An argument does not fit.
        BudgetError: The budget cannot be reached.
        InputError: The weights do not fit the model, or are not finite.
        UnsupportedModelError: The network cannot be traced or cut without weights.
    """
    judge = CRITERIA[criterion]() if isinstance(criterion, str) else criterion
    if judge.needs or judge.together:
        weighing = ", ".join(name for name in CRITERIA if not (CRITERIA[name].needs or CRITERIA[name].together))
        reads = "needs data" if judge.needs else "looks at all of them at once"
        raise ConfigError(
            f"a criterion must read weights one by one here, but {named(CRITERIA, judge)!r} {reads}. Give {weighing}."
        )
    seconds: dict[str, float] = {}
    with timed(seconds, "trace", step, "Tracing the network"):
        network = trace(_on_meta(model), example_inputs, freeze=freeze, only=only)
    with timed(seconds, "plan", step, "Choosing what to cut"):
        network.weights = stored = StoredWeights(Shards(weights), network)
        plan = decide(
            network, budget, criterion, allocator, round_to=round_to, seed=seed, floor=floor, ceiling=ceiling,
            rounds=rounds,
        )  # fmt: skip
    with timed(seconds, "cut", step, "Cutting"):
        cut = network.cut(plan)
        stored.entries_of(cut.module)
    return Chosen(plan=plan, network=network, cut=cut, stored=stored, seconds=seconds)


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
        if tensor.is_floating_point():
            parameter = self.network._layout.trace.parameters[name].parameter
            require_numbers(f"{self._stored[name]} in {self.shards.path}", tensor, infinite=not parameter)
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
