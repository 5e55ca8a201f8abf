"""The training that recoveries share: stochastic gradient descent with momentum and a cosine, resumed bit for bit.

Every epoch and every step has a seed of its own, and checkpoints are only written between two steps. So a run that went
on from one, in mid-epoch or not, is the uninterrupted run bit for bit (on one machine, with as many threads).

What differs between recoveries is the :class:`Lesson`: which module is trained, what its loss is, what must hold after
every step, and what is handed back.
"""

import contextlib
import copy
import hashlib
import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from metaprune.errors import ConfigError, InputError, MetapruneError, ResourceError
from metaprune.recovery._base import RECOVERIES, Context, Recovered, Recovery, at_least_float32, on_device
from metaprune.recovery._checkpoint import Checkpoint, digest, fingerprint, plain, shapes
from metaprune.recovery._interrupt import held_back_interrupt
from metaprune.task import Batch, Task

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOOK_EVERY = 20  # steps between two looks at the losses: on a GPU every look waits for all that was queued
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, kw_only=True)
class Trained(Recovery):
    """A recovery by training: the options of the course, and the lesson that is taught in it.

    Nesterov momentum; weight decay on weights alone, not on norms and biases; a learning rate that rises in a short
    warm-up and falls to zero along a cosine. Labels are smoothed by the task, samples augmented by the data. Batches
    are full ones; samples that do not fill the last one wait for the next epoch. A checkpoint is written after every
    epoch, every `checkpoint_seconds`, and at an interrupt. Weights that the plan has masked stay zero.

    Source: recipe of He et al., Deep Residual Learning, CVPR 2016, arXiv:1512.03385, section 4.2, with the cosine of
    Loshchilov and Hutter, SGDR, ICLR 2017, arXiv:1608.03983.

    Args:
        epochs: Passes over the training samples, at least 1.
        lr: Highest learning rate, above 0.
        batch_size: Samples per step, at least 1.
        momentum: In (0, 1).
        weight_decay: At least 0.
        warmup: Share of all steps in which the learning rate rises, in [0, 1).
        clip: Largest norm of the gradient, above 0; None does not clip.
        augment: Whether to change samples at random.
        recalibrate: Whether to re-estimate BatchNorm first.
        precision: ``fp32``, ``bf16``, ``fp16`` (with loss scaling), or ``auto``: bf16 where the device computes in it
            (GPUs; CPUs with AVX512-BF16 or AMX), else fp16 on a GPU and fp32 on a CPU. Weights stay in float32.
        channels_last: Whether images lie in memory pixel by pixel; ``auto`` does so on CPU and CUDA, where convolutions
            gain from it.
        checkpoint_seconds: Longest time between two checkpoints, in seconds; 0 writes one after every step.
    """

    epochs: int = 3
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    clip: float | None = None
    augment: bool = True
    recalibrate: bool = True
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for option, (rule, holds) in self.rules().items():
            if not holds:
                raise ConfigError(f"`{rule}` must hold, but {option}={getattr(self, option)!r}.")

    def rules(self) -> dict[str, tuple[str, bool]]:
        """Option -> what must hold for it, and whether it does."""
        precisions = ("auto", *PRECISIONS)
        return {
            "epochs": ("epochs >= 1", self.epochs >= 1),
            "lr": ("0 < lr < inf", 0 < self.lr < math.inf),
            "batch_size": ("batch_size >= 1", self.batch_size >= 1),
            "momentum": ("0 < momentum < 1", 0 < self.momentum < 1),
            "weight_decay": ("0 <= weight_decay < inf", 0 <= self.weight_decay < math.inf),
            "warmup": ("0 <= warmup < 1", 0 <= self.warmup < 1),
            "clip": ("clip > 0", self.clip is None or self.clip > 0),
            "precision": (f"precision in ({', '.join(precisions)})", self.precision in precisions),
            "channels_last": ("channels_last in (auto, on, off)", self.channels_last in ("auto", True, False)),
            "checkpoint_seconds": ("checkpoint_seconds >= 0", self.checkpoint_seconds >= 0),
        }

    def needs(self, model: nn.Module) -> frozenset[str]:
        """Training samples, the dense network where it teaches, calibration batches to re-estimate BatchNorm on."""
        needed = {"train"} | ({"dense"} if self.has_teacher() else set())
        return frozenset(needed | (RECOVERIES["recalibrate_norm"]().needs(model) if self.recalibrate else set()))

    def has_teacher(self) -> bool:
        """Whether the dense network plays a part."""
        return False

    def check(self, model: nn.Module, context: Context) -> None:
        """Also: there is something to train."""
        super().check(model, context)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                f"recovery {self.name!r} needs a parameter that may change, but all have requires_grad=False."
            )

    def learning_rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` of `steps`, counted from 0."""
        rising = int(self.warmup * steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2

    def dtype(self, device: torch.device) -> torch.dtype | None:
        """What matrix products are computed in on `device`, None for the dtype of the weights."""
        if self.precision != "auto":
            return PRECISIONS[self.precision]
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else None

    def in_channels_last(self, device: torch.device) -> bool:
        """Whether images lie in memory pixel by pixel on `device`."""
        return device.type in ("cpu", "cuda") if self.channels_last == "auto" else bool(self.channels_last)

    def course(self, model: nn.Module, context: Context) -> dict[str, Any]:
        """All that decides the result, as plain JSON."""
        assert context.train is not None
        own = asdict(self)
        del own["checkpoint_seconds"]
        own["precision"], own["channels_last"] = str(self.dtype(context.device)), self.in_channels_last(context.device)
        return {
            **own,
            "seed": context.seed,
            "device": context.device.type,
            "samples": len(context.train),
            "data": digest(next(iter(context.train.batches(min(8, len(context.train)))))),
            "task": plain(context.task),
            "shape of": shapes(model),
            "weights": fingerprint(model),
            "dense": fingerprint(context.dense) if self.has_teacher() and context.dense is not None else None,
            "masks": digest(dict(context.masks)) if context.masks else None,
        }

    def lesson(self, model: nn.Module, context: Context) -> "Lesson":
        """What is taught to `model`, which is a copy already and may be wrapped or changed."""
        return Lesson(model, context)

    def _recover(self, model: nn.Module, context: Context) -> Recovered:
        return Training(self, model, context).run()


class Lesson:
    """What one training teaches: the loss of the task, to the whole network.

    Args:
        model: The network, on its device, with its BatchNorms re-estimated.
        context: As for the recovery.

    Attributes:
        model: The module that is trained; its parameters and buffers are what checkpoints keep.
        notes: What a reader of the report should know.
    """

    def __init__(self, model: nn.Module, context: Context) -> None:
        self.model, self.context = model, context
        self.notes: list[str] = []

    def optimizer(self, recipe: Trained) -> Optimizer:
        """What steps the parameters."""
        groups = weight_decay_groups(self.model, recipe.weight_decay)
        return torch.optim.SGD(groups, recipe.lr, recipe.momentum, nesterov=True)

    def loss(self, batch: Batch) -> Tensor:
        """Of a batch, a scalar."""
        return self.context.task.step(self.model, batch)

    def settle(self, step: int, steps: int) -> None:
        """Make true what must hold after `step` of `steps` steps."""

    def tensors(self) -> Mapping[str, Tensor]:
        """What it remembers beside the module."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with what `tensors` gave."""

    def finished(self) -> nn.Module:
        """The network that is handed back."""
        return self.model


class Training:
    """One run of a recipe. Between two steps `step`, the sums, the history and the network always fit together.

    Args:
        recipe: The options of the course.
        model: A copy of the network; it is changed.
        context: As for the recovery.
        until: The last step of this part of the course; None for the end of the course.
        after: The part before this one, which may have trained a network of other sizes.
        teach: Makes the lesson; None for that of the recipe.
        course: What else decides the result, as plain JSON.
        name: Of the checkpoint; empty for that of the recipe.
    """

    def __init__(
        self,
        recipe: Trained,
        model: nn.Module,
        context: Context,
        until: int | None = None,
        after: "Training | None" = None,
        *,
        teach: "Callable[[nn.Module, Context], Lesson] | None" = None,
        course: Mapping[str, Any] | None = None,
        name: str = "",
    ) -> None:
        assert context.train is not None
        self.recipe, self.context, self.train = recipe, context, context.train
        self.config = {**recipe.course(model, context), **(course or {})}
        self.teach = teach or recipe.lesson
        self.batch_size = min(recipe.batch_size, len(self.train))
        self.epoch_steps = len(self.train) // self.batch_size
        self.steps = recipe.epochs * self.epoch_steps
        self.until = self.steps if until is None else until
        part = "" if self.until == self.steps else f"-{self.until}"
        self.path = None if context.folder is None else context.folder / f"{name or recipe.name}{part}.safetensors"
        self.dtype = recipe.dtype(context.device)
        self.layout = torch.channels_last if recipe.in_channels_last(context.device) else torch.contiguous_format
        self.model = model
        self.first = self.step = 0
        self.loss_sum, self.seen = 0.0, 0  # over the samples of this epoch
        self.unseen: list[tuple[Tensor, int]] = []  # losses not looked at yet, each with its number of samples
        self.history: list[dict[str, float]] = []
        self.earlier_s = 0.0
        self.notes: list[str] = []
        self.settled = True
        if after is not None:
            self.first = self.step = after.step
            self.loss_sum, self.seen, self.history = after.loss_sum, after.seen, list(after.history)
            self.earlier_s, self.notes = after.earlier_s, list(after.notes)

    def run(self) -> Recovered:
        """From the beginning, or from the checkpoint, to the last step."""
        self.began = self.saved = time.perf_counter()
        checkpoint = self._checkpoint_to_go_on_from()
        if checkpoint is None and self.recipe.recalibrate and self.first == 0:
            recalibrated = RECOVERIES["recalibrate_norm"]().recover(self.model, self.context)
            self.model = recalibrated.model
            self.notes += recalibrated.notes
        self._prepare()
        if checkpoint is not None:
            self._restore(checkpoint)
        self.context.progress.start(self.until, "batches", "training", done=self.step)
        try:
            with held_back_interrupt() as interrupted:
                while self.step < self.until:
                    self._rest_of_epoch(interrupted)
        except KeyboardInterrupt:
            if self.settled:
                with contextlib.suppress(MetapruneError):  # the interrupt is what counts
                    self._save()
            raise
        finally:
            self.context.progress.close()
        self._look()
        self.optimizer.zero_grad(set_to_none=True)
        lay_out(self.model, torch.contiguous_format)
        finished = self.lesson.finished()
        self.notes += [note for note in self.lesson.notes if note not in self.notes]
        return Recovered(finished, self.earlier_s, tuple(self.history), tuple(self.notes))

    def _prepare(self) -> None:
        self.lesson = self.teach(self.model, self.context)
        self.model = self.lesson.model.train()
        lay_out(self.model, self.layout)
        self.optimizer = self.lesson.optimizer(self.recipe)
        self.scaler = torch.amp.GradScaler(self.context.device.type, enabled=self.dtype == torch.float16)
        if self.dtype is not None:
            self.notes.append(f"mixed precision: {str(self.dtype).removeprefix('torch.')}")

    def _rest_of_epoch(self, interrupted: Callable[[], bool]) -> None:
        epoch, first = divmod(self.step, self.epoch_steps)
        self.epoch_began, self.epoch_first = time.perf_counter(), self.step
        batches = self.train.batches(
            self.batch_size,
            shuffle=torch.Generator().manual_seed(_derived(self.context.seed, "epoch", epoch)),
            augment=self.recipe.augment,
            device=self.context.device,
            drop_last=True,
            start=first,
        )
        last = min(self.epoch_steps, self.until - epoch * self.epoch_steps)
        for batch in itertools.islice(batches, last - first):
            self.settled = False
            self._one_step(batch)
            self.step += 1
            closes = self.step % self.epoch_steps == 0
            if closes:
                self._close_epoch(epoch)
            elif len(self.unseen) >= _LOOK_EVERY:
                self._look()
            self.settled = True
            self.context.progress.advance(1, self._status(epoch))
            if closes:
                entry = self.history[-1]
                self.context.metrics({name: entry[name] for name in ("train/loss", "lr", "images_per_s")}, epoch + 1)
            if closes or self.step == self.until or time.perf_counter() - self.saved >= self.recipe.checkpoint_seconds:
                self._save()
            if interrupted():
                raise KeyboardInterrupt
        if self.step < min((epoch + 1) * self.epoch_steps, self.until):
            raise InputError(
                f"{len(self.train)} samples must give {self.epoch_steps} batches of {self.batch_size}, but there were "
                f"{self.step - epoch * self.epoch_steps}. Look at what `batches` of the training data yields."
            )

    def _one_step(self, batch: Batch) -> None:
        torch.manual_seed(_derived(self.context.seed, "step", self.step))  # for dropout
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step, self.steps) * group.get("pace", 1.0)
        batch = in_layout(on_device(batch, self.context.device), self.layout)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with torch.autocast(self.context.device.type, self.dtype, enabled=self.dtype is not None):
                loss = self.lesson.loss(batch)
            self.scaler.scale(loss).backward()
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"a step must fit into the memory of {self.context.device}, but it does not with "
                f"batch_size={self.batch_size}. Lower it."
            ) from error
        if self.recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        keep_masks(self.model, self.context.masks)
        self.lesson.settle(self.step + 1, self.steps)
        self.unseen.append((loss.detach(), len(batch[0])))

    def _look(self) -> None:
        """Add up the losses since the last look; stop where one, or what it did to the network, is not finite."""
        losses = torch.stack([loss for loss, _ in self.unseen]).double().tolist() if self.unseen else []
        first = self.step - len(self.unseen)
        for step, (loss, (_, samples)) in enumerate(zip(losses, self.unseen), first + 1):
            if not math.isfinite(loss):
                self._diverged(f"the loss is {loss} at step {step}")
            self.loss_sum += loss * samples
            self.seen += samples
        self.unseen.clear()
        values = [tensor.detach() for tensor in _state(self.model).values() if tensor.is_floating_point()]
        if not bool(torch.stack([tensor.isfinite().all() for tensor in values]).all()):
            self._diverged(f"a weight or a running statistic is not finite at step {self.step}")

    def _diverged(self, what: str) -> NoReturn:
        kept = self.path is not None and self.path.exists()
        raise InputError(
            f"training must stay finite, but {what} of {self.steps}. Start over with a lower `lr` (it was "
            f"{self.recipe.lr:g}), or set `clip`{'' if self.recipe.precision == 'fp32' else ' or `precision=fp32`'}."
            + (f" The last good checkpoint is kept in {self.path}." if kept else "")
        )

    def _close_epoch(self, epoch: int) -> None:
        self._look()
        seconds = time.perf_counter() - self.epoch_began
        entry = {
            "epoch": epoch + 1,
            "train/loss": self.loss_sum / self.seen,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": (self.step - self.epoch_first) * self.batch_size / seconds,
            "seconds": seconds,
        }
        self.history.append(entry)
        self.loss_sum, self.seen = 0.0, 0
        self.context.after_epoch(self.model, epoch + 1)

    def _status(self, epoch: int) -> str:
        known = self.loss_sum / self.seen if self.seen else self.history[-1]["train/loss"] if self.history else None
        loss = "" if known is None else f", loss {known:.3f}"
        return f"epoch {epoch + 1}/{self.recipe.epochs}{loss}"

    def _save(self) -> None:
        self.saved = time.perf_counter()
        if self.path is None:
            return
        self._look()
        tensors = {f"model/{name}": tensor for name, tensor in _state(self.model).items()}
        tensors |= {f"lesson/{name}": tensor for name, tensor in self.lesson.tensors().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if value is not None:
                    tensors[f"{key}/{name}"] = value
        state = {
            "step": self.step,
            "loss_sum": self.loss_sum,
            "seen": self.seen,
            "history": self.history,
            "notes": self.notes,
            "scaler": self.scaler.state_dict(),
            "seconds": self.earlier_s + self.saved - self.began,
        }
        Checkpoint(self.config, state, tensors).save(self.path)

    def _checkpoint_to_go_on_from(self) -> Checkpoint | None:
        if self.path is None:
            return None
        if self.context.resume and self.path.exists():
            return Checkpoint.load(self.path, self.config)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)  # of other work: nothing may go on from it after a kill in the first minute
        return None

    def _restore(self, checkpoint: Checkpoint) -> None:
        state, tensors = checkpoint.state, checkpoint.tensors
        with torch.no_grad():
            for name, tensor in _state(self.model).items():
                tensor.copy_(tensors[f"model/{name}"])
            for name, parameter in self.model.named_parameters():
                for key in ("momentum_buffer", "step", "exp_avg", "exp_avg_sq"):
                    if f"{key}/{name}" in tensors:
                        self.optimizer.state[parameter][key] = _like(parameter, tensors[f"{key}/{name}"])
        prefix = "lesson/"
        self.lesson.restore({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
        self.step, self.loss_sum, self.seen = state["step"], state["loss_sum"], state["seen"]
        self.history, self.earlier_s = state["history"], state["seconds"]
        self.notes = [*state["notes"], f"went on at step {self.step} of {self.steps}"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


def keep_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set what is masked to zero again; weights that are parametrised or frozen keep their own."""
    if not masks:
        return
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, kept in masks.items():
            if name in parameters and parameters[name].requires_grad:
                parameters[name].masked_fill_(~kept.to(parameters[name].device), 0)


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """What an optimiser remembered, in the layout of its parameter."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape else value.clone()


def grown(schedule: str, done: float) -> float:
    """Which share of all that is to leave has left once a share `done` of the cuts is made.

    ``linear``: equal ones (Adapt-Pruner, arXiv:2502.03460). ``cubic``: large ones first, ``1 - (1 - done)^3`` (Zhu and
    Gupta, To prune, or not to prune, arXiv:1710.01878, equation 1).

    >>> grown("linear", 0.5), grown("cubic", 0.5)
    (0.5, 0.875)
    """
    return done if schedule == "linear" else 1 - (1 - done) ** 3


def distillation(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(softmax(wanted / T) || softmax(logits / T))``, the mean over all dimensions but the last.

    The factor keeps the gradient's size whatever the temperature (Hinton et al., section 2).

    Args:
        logits: (..., classes), of the network that learns.
        wanted: (..., classes), of its teacher.
        temperature: T.
    """
    told, known = (F.log_softmax(at_least_float32(x).flatten(0, -2) / temperature, dim=-1) for x in (logits, wanted))
    return temperature**2 * F.kl_div(told, known, reduction="batchmean", log_target=True)


def teacher_of(context: Context, recipe: Trained) -> nn.Module:
    """A copy of the dense network to learn from: the caller's may be in training mode, or on another device."""
    assert context.dense is not None
    teacher = copy.deepcopy(context.dense).to(context.device).eval().requires_grad_(False)
    lay_out(teacher, torch.channels_last if recipe.in_channels_last(context.device) else torch.contiguous_format)
    return teacher


def told_and_known(model: nn.Module, teacher: nn.Module, batch: Batch, task: Task) -> tuple[Tensor, Tensor]:
    """Logits of the network that learns, and of its teacher.

    Raises:
        InputError: They are not of one shape.
    """
    logits = task.outputs(model, batch)
    with torch.no_grad():
        wanted = task.outputs(teacher, batch)
    for given in (logits, wanted):
        if not isinstance(given, Tensor) or given.shape != logits.shape:
            raise InputError(
                "distillation needs logits of one shape from both networks, but they answer with "
                f"{_describe(logits)} and {_describe(wanted)}. Set `distil=0`."
            )
    return logits, wanted


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: weights decay, norms and everything of at most one dimension do not."""
    spared = {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decaying = [p for p in trained if p.ndim > 1 and id(p) not in spared]
    rest = [p for p in trained if p.ndim <= 1 or id(p) in spared]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Put every parameter of four dimensions into `layout`, in place."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            # `clone`, since `contiguous` keeps odd strides of 1x1 kernels, which make convolutions choose a layout.
            parameter.data = parameter.data.clone(memory_format=layout)


def in_layout(batch: Batch, layout: torch.memory_format) -> Batch:
    """The batch with its input in `layout`, if that is a batch of images."""
    if not isinstance(batch, tuple | list) or not isinstance(batch[0], Tensor) or batch[0].ndim != 4:
        return batch
    return (batch[0].contiguous(memory_format=layout), *batch[1:])


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and kept buffers by name, tied ones once."""
    kept = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return dict(model.named_parameters()) | buffers


def _derived(seed: int, what: str, number: int) -> int:
    """A seed for one epoch or one step, unrelated to its neighbours'."""
    return int.from_bytes(hashlib.sha256(f"{seed} {what} {number}".encode()).digest()[:7])


def _cpu_has_bf16() -> bool:
    """Elsewhere bfloat16 is emulated on CPUs, and slower than float32."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
