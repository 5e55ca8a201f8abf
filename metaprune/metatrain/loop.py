"""Meta-training: a metanetwork learns on a population, and is chosen on the networks that it did not learn from.

Every step draws a network, a budget and what the metanetwork may read, from a generator of its own, so that a run that
went on from a checkpoint is the uninterrupted one. A step takes one pass of the metanetwork and one vector-Jacobian
product, whatever the objectives. The checkpoint that is kept is the one of the largest validation area; if the area
collapses, training goes back to it with half the learning rate.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaprune.criteria import CRITERIA, metanet_edit, metanet_scores
from metaprune.data import Split
from metaprune.errors import ConfigError, InputError
from metaprune.metanet import Metanet, PaperMetanet, PaperShape, Shape, with_less_memory
from metaprune.metatrain.evaluate import RATIOS, Curve, curve_of, log_uniform
from metaprune.metatrain.objectives import OBJECTIVES, Objective, Pass, Subject
from metaprune.recovery import NoProgress, Progress
from metaprune.recovery._checkpoint import Checkpoint, digest
from metaprune.recovery._interrupt import held_back_interrupt
from metaprune.task import Classification, Task

FILE = "metatrain.safetensors"


@dataclass(frozen=True, kw_only=True)
class MetaTraining:
    """How to meta-train.

    Args:
        objectives: Names and weights.
        steps: Of the optimiser.
        lr: Highest learning rate.
        weight_decay: Of AdamW.
        warmup: Share of the steps in which the learning rate rises; after that it falls along a cosine.
        clip: Largest norm of the gradient.
        least: Smallest share of the multiply-accumulates that a step asks for.
        most: Largest share.
        silent: Chance that a step withholds the scores that need data.
        validate_every: Steps between two looks at the validation networks.
        images: Validation images, of each look.
        calibration: Images on which BatchNorm is re-estimated.
        batch_size: Images of a step, for objectives that need them.
        collapse: A validation area below this part of the best one is a collapse.
        seed: Decides every random number.

    Raises:
        ConfigError: A number is out of range, or an objective is unknown.
    """

    objectives: Mapping[str, float] = field(default_factory=lambda: {"amortised": 1.0})
    steps: int = 1500
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.05
    clip: float = 1.0
    least: float = 0.22
    most: float = 0.7
    silent: float = 0.25
    validate_every: int = 250
    images: int = 1000
    calibration: int = 512
    batch_size: int = 128
    collapse: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "steps": ("steps >= 1", self.steps >= 1),
            "lr": ("0 < lr < inf", 0 < self.lr < math.inf),
            "clip": ("clip > 0", self.clip > 0),
            "least": ("0 < least <= most <= 1", 0 < self.least <= self.most <= 1),
            "silent": ("0 <= silent <= 1", 0 <= self.silent <= 1),
            "weight_decay": ("0 <= weight_decay < inf", 0 <= self.weight_decay < math.inf),
            "warmup": ("0 <= warmup < 1", 0 <= self.warmup < 1),
            "validate_every": ("validate_every >= 1", self.validate_every >= 1),
            "images": ("images >= 1", self.images >= 1),
            "calibration": ("calibration >= 2", self.calibration >= 2),
            "batch_size": ("batch_size >= 2", self.batch_size >= 2),
            "collapse": ("0 <= collapse < 1", 0 <= self.collapse < 1),
            "objectives": ("at least one objective of positive weight", any(w > 0 for w in self.objectives.values())),
        }
        for name, (rule, holds) in rules.items():
            if not holds:
                raise ConfigError(f"`{rule}` must hold, but {name}={getattr(self, name)!r}.")
        for name in self.objectives:
            OBJECTIVES[name]

    def validation_images(self, split: Split) -> Split:
        """Those of a split that the looks measure on."""
        return split.subset(min(self.images, len(split)), self.seed)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0, before any collapse."""
        rising = max(int(self.warmup * self.steps), 1)
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * (1 + math.cos(math.pi * (step - rising) / max(self.steps - rising, 1))) / 2


@dataclass(frozen=True, eq=False)
class Trained:
    """What meta-training gives.

    Attributes:
        metanet: With the weights of the largest validation area.
        step: When that was.
        area: That area, in percent; the mean over validation networks.
        curves: By validation network, at that step.
        history: Every look: step and area.
        rollbacks: Steps at which a collapse was found.
    """

    metanet: Metanet | PaperMetanet
    step: int
    area: float
    curves: Mapping[str, Curve]
    history: tuple[tuple[int, float], ...]
    rollbacks: tuple[int, ...]


def meta_train(
    metanet: Metanet | PaperMetanet,
    train: Sequence[Subject],
    validation: Sequence[Subject],
    training: MetaTraining,
    *,
    images: Split,
    calibration: Callable[[], Iterator[Any]],
    batches: Split | None = None,
    task: Task | None = None,
    folder: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    metrics: Callable[[Mapping[str, float], int], None] = lambda values, step: None,
) -> Trained:
    """Train a metanetwork, in place.

    Args:
        metanet: To be trained.
        train: Networks to learn from.
        validation: Networks to choose on.
        training: How.
        images: Validation images.
        calibration: Batches for the re-estimation of BatchNorm.
        batches: Training images, for objectives that need them.
        task: Their loss; None means classification.
        folder: Where checkpoints go; None writes none.
        resume: Go on from the checkpoint in `folder`, if there is one.
        progress: Is told about steps.
        metrics: Gets numbers by name and step.

    Raises:
        ConfigError: There is no network to learn from or to choose on, a checkpoint of other work, or an objective that
            the metanetwork cannot have.
        InputError: The loss stays unusable after several rollbacks.
    """
    if not train or not validation:
        raise ConfigError(
            "meta-training needs networks to learn from and others to choose on, but there are "
            f"{len(train)} and {len(validation)}. Give some members of the population `split: validation`."
        )
    check_objectives(metanet.shape, training.objectives)
    run = _Run(metanet, train, validation, training, images, calibration, batches, task or Classification(), metrics)
    return run(folder, resume, progress or NoProgress())


def check_objectives(shape: Shape | PaperShape, names: Iterable[str]) -> None:
    """Objectives ask for no scores of a metanetwork that has none.

    Raises:
        ConfigError: One does.
    """
    asking = [name for name in names if OBJECTIVES[name].scores]
    if isinstance(shape, PaperShape) and asking:
        raise ConfigError(
            f"objective {asking[0]!r} asks what units are worth, but a metanetwork of `mode: paper` only edits. Train "
            "it with `objectives: {paper: 1}`, or leave `mode` out."
        )


class _Run:
    def __init__(
        self,
        metanet: Metanet | PaperMetanet,
        train: Sequence[Subject],
        validation: Sequence[Subject],
        training: MetaTraining,
        images: Split,
        calibration: Callable[[], Iterator[Any]],
        batches: Split | None,
        task: Task,
        metrics: Callable[[Mapping[str, float], int], None],
    ) -> None:
        self.metanet, self.train, self.validation, self.training = metanet, train, validation, training
        self.images = training.validation_images(images)
        self.calibration, self.batches, self.task, self.metrics = calibration, batches, task, metrics
        self.objectives: dict[str, Objective] = {name: OBJECTIVES[name]() for name in training.objectives}
        self.optimizer = torch.optim.AdamW(metanet.parameters(), lr=training.lr, weight_decay=training.weight_decay)
        self.step, self.factor = 0, 1.0
        self.best_area, self.best_step = -math.inf, 0
        self.best: dict[str, Tensor] = {}
        self.curves: dict[str, Curve] = {}
        self.history: list[tuple[int, float]] = []
        self.rollbacks: list[int] = []

    def __call__(self, folder: Path | None, resume: bool, progress: Progress) -> Trained:
        path = None if folder is None else folder / FILE
        if path is not None and resume and path.exists():
            self._restore(Checkpoint.load(path, self._config()))
        if not self.history:
            self._look(path)
        progress.start(self.training.steps, "steps", "meta-training", self.step)
        try:
            while self.step < self.training.steps:
                with held_back_interrupt():  # code below torch may swallow an interrupt that is raised within it
                    loss = self._one_step()
                self.step += 1
                progress.advance(1, f"loss {loss:.3g}, best area {self.best_area:.2f}")
                if self.step % self.training.validate_every == 0 or self.step == self.training.steps:
                    self._look(path)
        finally:
            progress.close()
        self.metanet.load_state_dict(self.best)
        return Trained(
            self.metanet.eval(), self.best_step, self.best_area, self.curves, tuple(self.history), tuple(self.rollbacks)
        )

    def _one_step(self) -> float:
        training = self.training
        random = np.random.default_rng((training.seed, self.step, len(self.rollbacks)))
        subject = self.train[int(random.integers(len(self.train)))]
        reads = dict(subject.distortions.reads)
        if random.random() < training.silent:
            reads = {name: score_U for name, score_U in reads.items() if not CRITERIA[name].needs}
        budget = log_uniform(random, training.least, training.most)
        for group in self.optimizer.param_groups:
            group["lr"] = self.factor * training.learning_rate(self.step)
        self.metanet.train()
        values = with_less_memory(self.metanet, lambda: self._gradient(subject, reads, budget))
        norm = torch.nn.utils.clip_grad_norm_(self.metanet.parameters(), training.clip)
        if bool(norm.isfinite()):
            self.optimizer.step()
        else:
            self._roll_back()
        values |= {"gradient": float(norm), "lr": self.optimizer.param_groups[0]["lr"]}
        self.metrics(values, self.step)
        return float(sum(value for key, value in values.items() if "/" in key))

    def _gradient(self, subject: Subject, reads: Mapping[str, Tensor], budget: float) -> dict[str, float]:
        """Gradients of all objectives together, in the parameters; and numbers to report."""
        random = np.random.default_rng((self.training.seed, self.step, len(self.rollbacks), 1))
        one = Pass(self.metanet, subject, reads, budget, self._endless(random), self.task, random)
        total = torch.zeros(())
        values: dict[str, float] = {}
        for name, objective in self.objectives.items():
            loss, numbers = objective(one)
            total = total + self.training.objectives[name] * loss
            values |= {f"{name}/{key}": number for key, number in numbers.items()}
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        return values | {"loss": float(total.detach())}

    def _endless(self, random: np.random.Generator) -> Iterator[Any]:
        if self.batches is None:
            raise ConfigError("objectives that train on images need them. Give the data's training split.")
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        size = min(self.training.batch_size, len(self.batches))
        while True:
            chosen = torch.randint(len(self.batches), (size,), generator=generator)
            yield self.batches.images(chosen), self.batches.labels[chosen]

    def _look(self, path: Path | None) -> None:
        """Measure the validation networks; keep the best, go back where it has collapsed, write a checkpoint."""
        self.metanet.eval()
        curves = {subject.name: self._curve(subject) for subject in self.validation}
        area = float(np.mean([curve.area for curve in curves.values()]))
        self.history.append((self.step, area))
        self.metrics({"validation/area": area} | {f"validation/{n}": c.area for n, c in curves.items()}, self.step)
        if area > self.best_area:
            self.best_area, self.best_step, self.curves = area, self.step, curves
            self.best = {name: tensor.detach().clone() for name, tensor in self.metanet.state_dict().items()}
        elif area < self.training.collapse * self.best_area:
            self._roll_back()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._checkpoint().save(path)

    def _curve(self, subject: Subject) -> Curve:
        reads, network, blocks = subject.distortions.reads, subject.network, subject.blocks
        edited = metanet_edit(self.metanet, network, blocks, reads, 0.5)
        return curve_of(
            network,
            lambda share: metanet_scores(self.metanet, network, blocks, reads, share),
            self.images,
            self.calibration,
            ratios=RATIOS,
            tensors=edited,
        )

    def _roll_back(self) -> None:
        self.rollbacks.append(self.step)
        if len(self.rollbacks) > 8:
            raise InputError(
                f"meta-training must not collapse again and again, but did at steps {self.rollbacks}. Lower `lr`, or "
                "look for unusable networks in the population."
            )
        self.metanet.load_state_dict(self.best)
        self.optimizer.state.clear()
        self.factor /= 2

    def _config(self) -> dict[str, Any]:
        return {
            **asdict(self.training),
            "objectives": dict(self.training.objectives),
            "shape": self.metanet.shape.to_json(),
            "train": [[subject.name, digest(dict(subject.distortions.reads))] for subject in self.train],
            "validation": [subject.name for subject in self.validation],
        }

    def _checkpoint(self) -> Checkpoint:
        tensors = {f"metanet/{name}": tensor for name, tensor in self.metanet.state_dict().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(item) for key, item in state.items()}
        state = {
            "step": self.step,
            "factor": self.factor,
            "best_area": self.best_area,
            "best_step": self.best_step,
            "history": self.history,
            "rollbacks": self.rollbacks,
            "curves": {name: [curve.ratios, curve.accuracies] for name, curve in self.curves.items()},
        }
        return Checkpoint(self._config(), state, tensors)

    def _restore(self, found: Checkpoint) -> None:
        parts: dict[str, dict[str, Tensor]] = {"metanet": {}, "best": {}, "optimizer": {}}
        for name, tensor in found.tensors.items():
            room, _, rest = name.partition("/")
            parts[room][rest] = tensor
        self.metanet.load_state_dict(parts["metanet"])
        self.best = parts["best"]
        content = self.optimizer.state_dict()
        content["state"] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, key = name.partition("/")
            content["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(content)
        state = found.state
        self.step, self.factor = state["step"], state["factor"]
        self.best_area, self.best_step = state["best_area"], state["best_step"]
        self.history = [(step, area) for step, area in state["history"]]
        self.rollbacks = list(state["rollbacks"])
        self.curves = {name: Curve(tuple(r), tuple(a)) for name, (r, a) in state["curves"].items()}
