"""What a network is for: how a batch is fed to it, and what its loss is.

Criteria that need gradients, and every way of training, take a task; users pass their own as
``--task package.module:factory``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
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

    def slope(self, model: Callable[..., Any], batch: Batch, generator: torch.Generator) -> Tensor:
        """A scalar whose gradient at the dense network says what weights do to the loss: the loss itself.

        A loss that is least at the dense network has no gradient there, and needs one of its own here.
        """
        return self.step(model, batch)


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
        """Outputs are logits (N, classes), the second entry of the batch int64 labels (N,).

        Raises:
            InputError: The batch holds no labels.
        """
        return F.cross_entropy(outputs, _target(batch, "labels"), label_smoothing=self.label_smoothing)


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


def main_output(outputs: Any) -> Tensor:
    """The tensor of numbers that a network returns, or the first of several; ``logits`` of a container.

    Raises:
        ConfigError: There is none.
    """
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    several = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    several = several if isinstance(several, (list, tuple)) else [several]
    for item in (logits, *several):
        if isinstance(item, Tensor) and item.is_floating_point():
            return item
    raise ConfigError(
        f"the network must return a tensor of numbers, but returned a {type(outputs).__name__}. Give a task of your "
        "own."
    )


def _target(batch: Batch, what: str) -> Any:
    """The second entry of a batch."""
    if not isinstance(batch, (list, tuple)) or len(batch) < 2:
        raise InputError(
            f"this loss needs {what}, but the batches hold inputs alone. Give pairs of inputs and {what}, or take the "
            "task feature_matching (--task, loss=), which needs none."
        )
    return batch[1]


@dataclass(frozen=True)
class FeatureMatching(Task):
    """Stay near the dense network; needs no labels.

    At the dense network this loss is zero, and so is its gradient. Criteria that read gradients get those of random
    projections of the output instead, whose expected squares are the curvature of the loss (Gauss-Newton).

    Args:
        dense: The network to match, in evaluation mode.
    """

    dense: nn.Module

    def outputs(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """The output, or the first of several."""
        return main_output(model(batch[0]))

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean squared difference of the outputs over the mean square of the dense ones."""
        with torch.no_grad():
            wanted = self.outputs(self.dense, batch)
        return F.mse_loss(outputs, wanted) / wanted.square().mean().clamp_min(1e-12)

    def slope(self, model: Callable[..., Any], batch: Batch, generator: torch.Generator) -> Tensor:
        """A random projection of the outputs; n samples times the mean square of its gradient is the curvature."""
        outputs = self.outputs(model, batch)
        signs = torch.randint(2, outputs.shape, generator=generator).to(outputs) * 2 - 1
        entries = outputs.numel() / len(outputs)
        scale = (2 / (entries * outputs.detach().square().mean().clamp_min(1e-12))).sqrt() / len(outputs)
        return scale * (signs * outputs).sum()


@dataclass(frozen=True)
class CustomLoss(Task):
    """A loss given as a function ``loss(outputs, targets) -> scalar``; the second entry of a batch is the target."""

    function: Callable[[Any, Any], Tensor]

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """Call the function.

        Raises:
            InputError: The batch holds no targets.
        """
        return self.function(outputs, _target(batch, "targets"))


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


def require_classes(task: Task | None, targets: Iterable[Any]) -> None:
    """Samples that a classifier is judged by are of more than one class.

    Args:
        task: Any but :class:`Classification` may have what it likes.
        targets: Second entries of batches.

    Raises:
        InputError: They are not.
    """
    labels = set[int]()
    for target in targets if isinstance(task, Classification) else ():
        if isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point():
            labels.update(target.unique().tolist())
    if len(labels) == 1:
        raise InputError(
            f"calibration data must hold more than one class, but all samples are of class {labels.pop()}. Give more "
            "of them, drawn from all classes."
        )


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
