"""What every recovery promises: a changed copy of a network, with the dense one and the given one as they were."""

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from metaprune.errors import ConfigError
from metaprune.graph import Network
from metaprune.methods import deal
from metaprune.plans import Plan
from metaprune.registry import Registry
from metaprune.task import Batch, Classification, Task


class TrainingData(Protocol):
    """Samples to train on; a :class:`metaprune.data.Split` is one."""

    def __len__(self) -> int: ...

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: torch.Generator | None = None,
        augment: bool = False,
        device: str | torch.device = "cpu",
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[Batch]:
        """One pass, without its first `start` batches; equally seeded generators give equal passes."""
        ...


class Progress(Protocol):
    """Somebody who watches; a bar with an ETA can be drawn from these calls."""

    def start(self, total: int, unit: str, description: str, done: int = 0) -> None:
        """A piece of work begins: `total` units (``"batches"``, ``"images"``), `done` of them by an earlier process."""
        ...

    def advance(self, amount: int = 1, status: str = "") -> None:
        """`amount` more units are done; `status` is worth showing beside the bar."""
        ...

    def close(self) -> None:
        """The piece of work is over, also when it failed."""
        ...


class NoProgress:
    """Nobody watches."""

    def start(self, total: int, unit: str, description: str, done: int = 0) -> None:
        """Do nothing."""

    def advance(self, amount: int = 1, status: str = "") -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def no_metrics(values: Mapping[str, float], step: int) -> None:
    """Do nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """What a recovery may use.

    Args:
        train: Samples to fit weights on. Nothing is ever chosen on validation or test data here.
        calibration: Gives a fresh pass over the calibration batches, always the same; labels are not read. The batches
            should be augmented as in training (see :class:`~metaprune.recovery.recalibrate_norm.RecalibrateNorm`).
        task: How a batch is fed to the network, and the loss.
        dense: The network before it was cut, as a teacher. It is never changed.
        network: The same, traced.
        plan: What was cut from it; None for nothing.
        device: Where to work; the result lies there too.
        seed: Decides every random number.
        folder: Where checkpoints go; None writes none.
        resume: Go on from the checkpoint in `folder`, if there is one.
        progress: Is told about long work.
        metrics: Gets numbers by name and the epoch that they belong to, counted from 1.
        masks: Weights of which some entries must stay zero -> which ones may change, in the shapes of the cut network.
        after_epoch: Gets the network in training and the number of the epoch that has ended, counted from 1, and leaves
            the network as it is. No checkpoint is written before it returns, so it misses no epoch, whatever is killed.
    """

    train: TrainingData | None = None
    calibration: Callable[[], Iterator[Batch]] | None = None
    task: Task = field(default_factory=Classification)
    dense: nn.Module | None = None
    network: Network | None = None
    plan: Plan | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    folder: Path | None = None
    resume: bool = False
    progress: Progress = field(default_factory=NoProgress)
    metrics: Callable[[Mapping[str, float], int], None] = no_metrics
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    after_epoch: Callable[[nn.Module, int], None] = lambda model, epoch: None


@dataclass(frozen=True, eq=False)
class Recovered:
    """What a recovery hands back.

    Args:
        model: The changed copy, with the training flags of the given network.
        seconds: Wall-clock time, that of interrupted processes included.
        history: One entry an epoch, empty for methods without epochs.
        notes: What a reader of the report should know.
    """

    model: nn.Module
    seconds: float
    history: tuple[Mapping[str, float], ...] = ()
    notes: tuple[str, ...] = ()


class Recovery(ABC):
    """Brings back accuracy. Concrete recoveries are frozen dataclasses in :data:`RECOVERIES`.

    Attributes:
        name: The name in the registry.
    """

    name: ClassVar[str]

    def needs(self, model: nn.Module) -> frozenset[str]:
        """Which of ``train``, ``calibration`` and ``dense`` the context must have for this network."""
        return frozenset()

    def check(self, model: nn.Module, context: Context) -> None:
        """Whether the context has what is needed for this network; the network before the cut serves as well.

        Raises:
            ConfigError: The context lacks what this recovery needs.
        """
        for what, way_out in _WAYS_OUT.items():
            if what in self.needs(model) and getattr(context, what) is None:
                raise ConfigError(f"recovery {self.name!r} needs {way_out}")
        if "train" in self.needs(model) and context.train is not None and len(context.train) == 0:
            raise ConfigError(f"recovery {self.name!r} needs samples to train on, but there are none.")

    def recover(self, model: nn.Module, context: Context) -> Recovered:
        """A changed copy of `model`, on the device of the context; `model` and the dense network stay as they were.

        Torch's global generators are left where they were.

        Raises:
            ConfigError: The context lacks what this recovery needs; nothing was done.
            InputError: Data or weights are unusable, or training diverged.
        """
        self.check(model, context)
        began = time.perf_counter()
        flags = {name: module.training for name, module in model.named_modules()}
        changed = copy.deepcopy(model).to(context.device)
        cuda = [context.device] if context.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            recovered = self._recover(changed, context)
        for name, module in recovered.model.named_modules():
            module.training = flags.get(name, False)
        seconds = recovered.seconds + time.perf_counter() - began
        return Recovered(recovered.model, seconds, recovered.history, recovered.notes)

    @abstractmethod
    def _recover(self, model: nn.Module, context: Context) -> Recovered:
        """Change `model`, which is a copy already; `seconds` are those of earlier processes alone."""


_WAYS_OUT = {
    "train": "samples to train on. Give `data=` (--data), or a recovery that trains nothing.",
    "calibration": "calibration samples. Give `data=` (--data).",
    "dense": "the dense network to be near to. Give `dense=`; `finetune` does without it at `distil=0`.",
}

RECOVERIES: Registry[type[Recovery]] = Registry("recovery", "metaprune.recovery", home="metaprune.recovery")


def torch_device(accelerator: str) -> torch.device:
    """The device that ``--accelerator`` means.

    Raises:
        ConfigError: It is none of ``auto``, ``cpu`` and ``cuda``, or there is no GPU.
    """
    if accelerator not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"accelerator must be auto, cpu or cuda, but is {accelerator!r}.")
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError("accelerator 'cuda' needs a GPU that torch can see, but there is none. Use auto or cpu.")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with every tensor in it on `device`; tuples, lists and dicts keep their form."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: on_device(part, device) for key, part in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [on_device(part, device) for part in batch]
        return parts if isinstance(batch, list) else tuple(parts)
    return batch


def at_least_float32(values: Tensor) -> Tensor:
    """The values, those in half precision as float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def resolve(spec: "str | Recovery | Sequence[Recovery] | None", **options: Any) -> list[Recovery]:
    """The recoveries that the user means, in the order in which they are to run.

    Args:
        spec: Registered names separated by commas, recoveries, or None (or ``"none"``) for no recovery at all.
        **options: Options of the named recoveries; each goes to every recovery that has it, or as ``name.option`` to
            one of them. None means the default.

    Raises:
        ConfigError: There is no such recovery or option, a value does not fit, a name is given twice, or options come
            with recoveries that have theirs.

    >>> resolve("recalibrate_norm", passes=2)
    [RecalibrateNorm(passes=2)]
    """
    given = {key: value for key, value in options.items() if value is not None}
    if isinstance(spec, str):
        return list(deal(RECOVERIES, names_in(spec), given)[0].values())
    ways = [spec] if isinstance(spec, Recovery) else list(spec or ())
    if ways and given:
        raise ConfigError(
            f"options are for recoveries that are named, but {', '.join(given)} came with {ways!r}. Give them to these."
        )
    return ways


def names_in(spec: str | None) -> list[str]:
    """The names in ``one,two``; none in ``none``.

    Raises:
        ConfigError: A name is given twice.
    """
    names = [name.strip() for name in spec.split(",")] if spec and spec.strip() not in ("", "none") else []
    if len(set(names)) < len(names):
        raise ConfigError(f"every recovery can be named once, but {spec!r} names one twice.")
    return names
