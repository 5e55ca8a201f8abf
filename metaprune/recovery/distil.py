"""Learn from the dense network: its logits, and the features of layers on the way."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metaprune.errors import ConfigError
from metaprune.recovery._base import RECOVERIES, Context, at_least_float32
from metaprune.recovery._training import Lesson, Trained, distillation, teacher_of, told_and_known
from metaprune.task import Batch


@RECOVERIES.register("distil")
@dataclass(frozen=True, kw_only=True)
class Distil(Trained):
    """Train with the dense network as the teacher: its logits, and what its layers give on the way.

    The loss is ``(1 - distil) * task + distil * logits + features * sum_l alpha_l ||T_l - S_l||^2`` over layers l.
    `T_l` and `S_l` are what layer l gives in the dense and in the cut network. With `alpha_l = 1 / (L ||T_l||^2)` every
    one of L layers weighs the same, however large its features are. The course is that of
    :class:`~metaprune.recovery._training.Trained`, with all its options.

    Source: LAPTOP-Diff (Zhang et al., arXiv:2404.11098), normalised feature distillation; Hinton et al.,
    arXiv:1503.02531, for the logits. Differs: the common factor ``mean_l ||T_l||^2`` of the weights is left out, so
    that the loss has no unit and does not change when a layer is rescaled in both networks.

    Args:
        distil: Weight of the teacher's logits in [0, 1]; what is left is that of the task's loss. At 1 no labels are
            read.
        temperature: Of the logits, above 0.
        features: Weight of the features, at least 0.
        layers: Paths of the layers whose features are compared; empty for the blocks (modules with parts inside a list
            or sequence of them), or where none fits, every module, that gives one shape in both networks.
    """

    name: ClassVar[str] = "distil"

    distil: float = 0.9
    temperature: float = 4.0
    features: float = 1.0
    layers: tuple[str, ...] = ()

    def rules(self) -> dict[str, tuple[str, bool]]:
        """Also those of the weights."""
        return super().rules() | {
            "distil": ("0 <= distil <= 1", 0 <= self.distil <= 1),
            "temperature": ("0 < temperature < inf", 0 < self.temperature < float("inf")),
            "features": ("0 <= features < inf", 0 <= self.features < float("inf")),
        }

    def has_teacher(self) -> bool:
        """Always."""
        return True

    def check(self, model: nn.Module, context: Context) -> None:
        """Also: the layers named are there."""
        super().check(model, context)
        known = dict(model.named_modules())
        missing = [path for path in self.layers if path not in known]
        if missing:
            raise ConfigError(f"every layer must be a module of the network, but {missing[0]!r} is none.")

    def lesson(self, model: nn.Module, context: Context) -> Lesson:
        """What the dense network teaches."""
        return _Features(model, context, self)


class _Features(Lesson):
    """The loss above; which layers are compared is decided on the first batch of training samples."""

    def __init__(self, model: nn.Module, context: Context, recipe: Distil) -> None:
        super().__init__(model, context)
        self.recipe, self.teacher = recipe, teacher_of(context, recipe)
        self.layers = self._comparable() if recipe.features else ()
        if recipe.features and not self.layers:
            self.notes.append("no layer gives features of one shape in both networks, so logits alone teach")

    def loss(self, batch: Batch) -> Tensor:
        """Of a batch, a scalar."""
        recipe, task = self.recipe, self.context.task
        with Features(self.model, self.layers) as own, Features(self.teacher, self.layers) as wanted:
            logits, known = told_and_known(self.model, self.teacher, batch, task)
        loss = recipe.features * feature_loss(own.seen, wanted.seen) if self.layers else logits.new_zeros(())
        if recipe.distil:
            loss = loss + recipe.distil * distillation(logits, known, recipe.temperature)
        return loss if recipe.distil == 1 else loss + (1 - recipe.distil) * task.loss(logits, batch)

    def _comparable(self) -> tuple[str, ...]:
        assert self.context.train is not None
        batch = next(iter(self.context.train.batches(min(2, len(self.context.train)), device=self.context.device)))
        paths = [path for path, _ in self.model.named_modules() if path]
        shapes = []
        flags = {module: module.training for module in self.model.modules()}
        with torch.no_grad():
            for net in (self.model.eval(), self.teacher):
                there = {path for path, _ in net.named_modules()}
                with Features(net, [path for path in paths if path in there]) as features:
                    self.context.task.outputs(net, batch)
                shapes.append({path: value.shape for path, value in features.seen.items()})
        for module, training in flags.items():
            module.training = training
        fitting = [path for path in paths if path in shapes[0] and shapes[0][path] == shapes[1].get(path)]
        if self.recipe.layers:
            wrong = [path for path in self.recipe.layers if path not in fitting]
            if wrong:
                raise ConfigError(
                    f"features are compared where both networks give one shape, but {wrong[0]!r} gives "
                    f"{shapes[0].get(wrong[0])} and {shapes[1].get(wrong[0])}. Name another layer, or none."
                )
            return self.recipe.layers
        return tuple(_blocks(self.model, fitting) or fitting)


class Features:
    """Notes what modules give while it is open.

    Args:
        model: The network.
        paths: Its modules; of several calls of one the last counts.

    Attributes:
        seen: Path -> the tensor, for modules that give one, alone or first in a tuple.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self.model, self.paths = model, paths
        self.seen: dict[str, Tensor] = {}

    def __enter__(self) -> "Features":
        self._hooks = ExitStack()
        for path in self.paths:
            hook = self.model.get_submodule(path).register_forward_hook(self._noting(path))
            self._hooks.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def _noting(self, path: str) -> Any:
        def note(module: nn.Module, inputs: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) and out else out
            if isinstance(first, Tensor) and first.is_floating_point():
                self.seen[path] = first

        return note


def feature_loss(own: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """``mean_l ||T_l - S_l||^2 / ||T_l||^2``, a scalar.

    Args:
        own: Features of the network that learns, by layer.
        wanted: Those of its teacher, of the same shapes.
    """
    terms = []
    for path, features in own.items():
        target = at_least_float32(wanted[path]).detach()
        error = (at_least_float32(features) - target).square().sum()
        terms.append(error / target.square().sum().clamp_min(torch.finfo(target.dtype).tiny))
    return torch.stack(terms).mean()


def _blocks(model: nn.Module, paths: list[str]) -> list[str]:
    """Those that lie in a list or sequence of modules and have parts themselves."""
    modules = dict(model.named_modules())
    listed = (nn.Sequential, nn.ModuleList)
    return [
        path
        for path in paths
        if isinstance(modules[path.rpartition(".")[0]], listed) and any(True for _ in modules[path].children())
    ]
