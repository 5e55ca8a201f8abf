"""What a network is for: how a batch is fed to it, and what its loss is.

Criteria that need gradients, and every way of training, take a task; users pass their own as
``--task package.module:factory``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.errors import ConfigError, InputError, MetapruneError, did_you_mean
from metaprune.factory import FORM, import_factory, looks_importable
from metaprune.registry import Registry

Batch = Any  # what a data loader yields; a built-in task reads (inputs, targets)

TASKS: Registry["type[Task]"] = Registry("task", "metaprune.tasks")


class Task(ABC):
    """How to run a network on a batch, and what is to be small."""

    def outputs(self, model: Callable[..., Any], batch: Batch) -> Any:
        """Run the network; the first entry of a batch is its input."""
        return model(batch[0])

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar."""

    def step(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Loss of the network on a batch."""
        return self.loss(self.outputs(model, batch), batch)


@TASKS.register("classification")
@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Cross-entropy on class labels.

    Args:
        label_smoothing: Share of the target spread over all classes, in [0, 1).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"`0 <= label_smoothing < 1` must hold, but it is {self.label_smoothing}.")

    def outputs(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The logits (N, classes)."""
        return logits_of(model(batch[0]))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Outputs are logits (N, classes), the second entry of the batch int64 labels (N,)."""
        return F.cross_entropy(outputs, batch[1], label_smoothing=self.label_smoothing)


def logits_of(outputs: Any) -> Tensor:
    """What a classifier returns as scores: a tensor itself, or the entry ``logits`` of a container.

    Raises:
        ConfigError: It returns neither.
    """
    found = getattr(outputs, "logits", None) if not isinstance(outputs, dict) else outputs.get("logits")
    scores = outputs if isinstance(outputs, Tensor) else found
    if not isinstance(scores, Tensor):
        raise ConfigError(
            f"a classifier must return a tensor, or a container with `logits`, but returned a "
            f"{type(outputs).__name__}. Use another task for this network."
        )
    return scores


@dataclass(frozen=True)
class FeatureMatching(Task):
    """Stay near the dense network; needs no labels.

    Args:
        dense: The network to match, in evaluation mode.
    """

    dense: nn.Module

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean squared difference of the outputs over the mean square of the dense ones."""
        with torch.no_grad():
            wanted = self.outputs(self.dense, batch)
        return F.mse_loss(outputs, wanted) / wanted.square().mean().clamp_min(1e-12)


@dataclass(frozen=True)
class CustomLoss(Task):
    """A loss given as a function ``loss(outputs, targets) -> scalar``; the second entry of a batch is the target."""

    function: Callable[[Any, Any], Tensor]

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Call the function."""
        return self.function(outputs, batch[1])


def resolve_task(task: "str | Task | Callable[..., Tensor] | None", dense: nn.Module) -> Task:
    """The task that the user means.

    Args:
        task: A registered name, ``feature_matching``, ``package.module:factory``, a task, or a loss function
            ``loss(outputs, targets)``. None means classification.
        dense: The dense network, for ``feature_matching``.

    Raises:
        ConfigError: There is no such task, or the factory returns none.
    """
    if task is None:
        return Classification()
    if isinstance(task, Task):
        return task
    if task == "feature_matching":
        return FeatureMatching(dense)
    if isinstance(task, str):
        if task not in TASKS and not looks_importable(task):
            known = (*TASKS, "feature_matching")
            raise ConfigError(
                f"no task is named {task!r}.{did_you_mean(task, known)} Known: {', '.join(sorted(known))}, {FORM}."
            )
        if task in TASKS:
            return TASKS[task]()
        made = import_factory(task, f"{task!r} is neither a task nor a factory that can be imported.")
        made = made() if not isinstance(made, Task) else made
        if not isinstance(made, Task):
            raise ConfigError(f"{task!r} must return a metaprune.task.Task, but returned a {type(made).__name__}.")
        return made
    return CustomLoss(task)


@contextmanager
def on_calibration_data() -> Iterator[None]:
    """Here a network runs on calibration data.

    Raises:
        InputError: It does not.
    """
    try:
        yield
    except (MetapruneError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise InputError(
            f"the network must run on the calibration data, but raised {type(error).__name__}: {error}. Give data like "
            "the example input."
        ) from error


def require_finite(tensors: Iterable[Tensor]) -> None:
    """Numbers of a batch are numbers.

    Raises:
        InputError: Some are NaN or infinite.
    """
    wrong = sum(int((~tensor.isfinite()).sum()) for tensor in tensors if tensor.is_floating_point())
    if wrong:
        raise InputError(
            f"calibration data must be finite, but {wrong} numbers of a batch are not. Look for NaN and infinities in "
            "the data, or in how they are normalised."
        )
