"""Train the cut network on, optionally with the dense network as a teacher."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from metaprune.recovery._base import RECOVERIES, Context
from metaprune.recovery._training import Lesson, Trained, distillation, teacher_of, told_and_known
from metaprune.task import Batch


@RECOVERIES.register("finetune")
@dataclass(frozen=True, kw_only=True)
class Finetune(Trained):
    """Stochastic gradient descent on the training samples; the result is the last epoch, whatever it is worth.

    The course is that of :class:`~metaprune.recovery._training.Trained`, with all its options.

    Source: as there; distillation: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531.

    Args:
        distil: Weight of the teacher in [0, 1]; what is left is that of the task's loss. At 1 labels are not read.
        temperature: Of the distillation, above 0.

    >>> [round(Finetune(lr=1.0, warmup=0.5).learning_rate(step, 6), 3) for step in range(6)]
    [0.333, 0.667, 1.0, 1.0, 0.75, 0.25]
    """

    name: ClassVar[str] = "finetune"

    distil: float = 0.0
    temperature: float = 4.0

    def rules(self) -> dict[str, tuple[str, bool]]:
        """Also those of the distillation."""
        return super().rules() | {
            "distil": ("0 <= distil <= 1", 0 <= self.distil <= 1),
            "temperature": ("0 < temperature < inf", 0 < self.temperature < float("inf")),
        }

    def has_teacher(self) -> bool:
        """If it has a weight."""
        return self.distil > 0

    def lesson(self, model: nn.Module, context: Context) -> Lesson:
        """The task's loss, that of the teacher, or both."""
        return _Taught(model, context, self) if self.distil else Lesson(model, context)


class _Taught(Lesson):
    """``(1 - distil) * loss of the task + distil * distillation``."""

    def __init__(self, model: nn.Module, context: Context, recipe: Finetune) -> None:
        super().__init__(model, context)
        self.recipe, self.teacher = recipe, teacher_of(context, recipe)

    def loss(self, batch: Batch) -> Tensor:
        """Of a batch, a scalar.

        Raises:
            InputError: Network and teacher do not answer with logits of one shape.
        """
        logits, wanted = told_and_known(self.model, self.teacher, batch, self.context.task)
        share, task = self.recipe.distil, self.context.task
        taught = share * distillation(logits, wanted, self.recipe.temperature)
        return taught if share == 1 else (1 - share) * task.loss(logits, batch) + taught
