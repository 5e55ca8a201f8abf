"""Train the cut network on: SGD with momentum and a cosine, optionally with the dense network as a teacher.

Every epoch and every step has a seed of its own, and checkpoints are only written between two steps. So a run that went
on from one, in mid-epoch or not, is the uninterrupted run bit for bit (on one machine, with as many threads).
"""

import contextlib
import copy
import hashlib
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from metaprune.errors import ConfigError, InputError, MetapruneError, ResourceError
from metaprune.recovery._base import RECOVERIES, Context, Recovered, Recovery, at_least_float32, on_device
from metaprune.recovery._checkpoint import Checkpoint, digest, fingerprint, plain, shapes
from metaprune.recovery._interrupt import held_back_interrupt
from metaprune.task import Batch, Task

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_LOOK_EVERY = 20  # steps between two looks at the losses: on a GPU every look waits for all that was queued
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@RECOVERIES.register("finetune")
@dataclass(frozen=True, kw_only=True)
class Finetune(Recovery):
    """Stochastic gradient descent on the training samples; the result is the last epoch, whatever it is worth.

    Nesterov momentum; weight decay on weights alone, not on norms and biases; a learning rate that rises in a short
    warm-up and falls to zero along a cosine. Labels are smoothed by the task, samples augmented by the data. Batches
    are full ones; samples that do not fill the last one wait for the next epoch. A checkpoint is written after every
    epoch, every `checkpoint_seconds`, and at an interrupt.

    Source: recipe of He et al., Deep Residual Learning, CVPR 2016, arXiv:1512.03385, section 4.2, with the cosine of
    Loshchilov and Hutter, SGDR, ICLR 2017, arXiv:1608.03983; distillation: Hinton et al., Distilling the Knowledge in a
    Neural Network, arXiv:1503.02531.

    Args:
        epochs: Passes over the training samples, at least 1.
        lr: Highest learning rate, above 0.
        batch_size: Samples per step, at least 1.
        momentum: In (0, 1).
        weight_decay: At least 0.
        warmup: Share of all steps in which the learning rate rises, in [0, 1).
        clip: Largest norm of the gradient, above 0; None does not clip.
        distil: Weight of the teacher in [0, 1]; what is left is that of the task's loss. At 1 labels are not read.
        temperature: Of the distillation, above 0.
        augment: Whether to change samples at random.
        recalibrate: Whether to re-estimate BatchNorm first.
        precision: ``fp32``, ``bf16``, ``fp16`` (with loss scaling), or ``auto``: bf16 where the device computes in it
            (GPUs; CPUs with AVX512-BF16 or AMX), else fp16 on a GPU and fp32 on a CPU. Weights stay in float32.
        channels_last: Whether images lie in memory pixel by pixel; ``auto`` does so on CPU and CUDA, where convolutions
            gain from it.
        checkpoint_seconds: Longest time between two checkpoints, in seconds; 0 writes one after every step.
    """

    name: ClassVar[str] = "finetune"

    epochs: int = 3
    lr: float = 0.01
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    clip: float | None = None
    distil: float = 0.0
    temperature: float = 4.0
    augment: bool = True
    recalibrate: bool = True
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        precisions = ("auto", *PRECISIONS)
        rules = {
            "epochs": ("epochs >= 1", self.epochs >= 1),
            "lr": ("0 < lr < inf", 0 < self.lr < math.inf),
            "batch_size": ("batch_size >= 1", self.batch_size >= 1),
            "momentum": ("0 < momentum < 1", 0 < self.momentum < 1),
            "weight_decay": ("0 <= weight_decay < inf", 0 <= self.weight_decay < math.inf),
            "warmup": ("0 <= warmup < 1", 0 <= self.warmup < 1),
            "clip": ("clip > 0", self.clip is None or self.clip > 0),
            "distil": ("0 <= distil <= 1", 0 <= self.distil <= 1),
            "temperature": ("0 < temperature < inf", 0 < self.temperature < math.inf),
            "precision": (f"precision in ({', '.join(precisions)})", self.precision in precisions),
            "channels_last": ("channels_last in (auto, on, off)", self.channels_last in ("auto", True, False)),
            "checkpoint_seconds": ("checkpoint_seconds >= 0", self.checkpoint_seconds >= 0),
        }
        for option, (rule, holds) in rules.items():
            if not holds:
                raise ConfigError(f"`{rule}` must hold, but {option}={getattr(self, option)!r}.")

    def needs(self, model: nn.Module) -> frozenset[str]:
        """Training samples; a teacher to distil from; calibration batches to re-estimate BatchNorm on."""
        needed = {"train"} | ({"dense"} if self.distil else set())
        return frozenset(needed | (RECOVERIES["recalibrate_norm"]().needs(model) if self.recalibrate else set()))

    def check(self, model: nn.Module, context: Context) -> None:
        """Also: there is something to train."""
        super().check(model, context)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ConfigError(
                "recovery 'finetune' needs a parameter that may change, but all have requires_grad=False."
            )

    def learning_rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` of `steps`, counted from 0.

        >>> [round(Finetune(lr=1.0, warmup=0.5).learning_rate(step, 6), 3) for step in range(6)]
        [0.333, 0.667, 1.0, 1.0, 0.75, 0.25]
        """
        rising = int(self.warmup * steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * (1 + math.cos(math.pi * (step - rising) / (steps - rising))) / 2

    def loss(self, model: nn.Module, teacher: nn.Module | None, batch: Batch, task: Task) -> Tensor:
        """``(1 - distil) * loss of the task + distil * distillation``, a scalar.

        Raises:
            InputError: Network and teacher do not answer with logits of one shape.
        """
        if teacher is None:
            return task.step(model, batch)
        logits = task.outputs(model, batch)
        with torch.no_grad():
            wanted = task.outputs(teacher, batch)
        for given in (logits, wanted):
            if not isinstance(given, Tensor) or given.shape != logits.shape:
                raise InputError(
                    "distillation needs logits of one shape from both networks, but they answer with "
                    f"{_describe(logits)} and {_describe(wanted)}. Set `distil=0`."
                )
        taught = self.distil * distillation(logits, wanted, self.temperature)
        return taught if self.distil == 1 else (1 - self.distil) * task.loss(logits, batch) + taught

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
            "dense": fingerprint(context.dense) if self.distil and context.dense is not None else None,
        }

    def _recover(self, model: nn.Module, context: Context) -> Recovered:
        return _Training(self, model, context).run()


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


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: weights decay, norms and everything of at most one dimension do not."""
    spared = {id(p) for module in model.modules() if isinstance(module, _NORMS) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    decaying = [p for p in trained if p.ndim > 1 and id(p) not in spared]
    rest = [p for p in trained if p.ndim <= 1 or id(p) in spared]
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def checkpoint_path(context: Context) -> Path | None:
    """Where the checkpoint is kept."""
    return None if context.folder is None else context.folder / "finetune.safetensors"


class _Training:
    """One run of the recipe. Between two steps `step`, the sums, the history and the network always fit together."""

    def __init__(self, recipe: Finetune, model: nn.Module, context: Context) -> None:
        assert context.train is not None
        self.recipe, self.context, self.train = recipe, context, context.train
        self.config = recipe.course(model, context)
        self.path = checkpoint_path(context)
        self.batch_size = min(recipe.batch_size, len(self.train))
        self.epoch_steps = len(self.train) // self.batch_size
        self.steps = recipe.epochs * self.epoch_steps
        self.dtype = recipe.dtype(context.device)
        self.layout = torch.channels_last if recipe.in_channels_last(context.device) else torch.contiguous_format
        self.model = model
        self.teacher: nn.Module | None = None
        if recipe.distil and context.dense is not None:
            # A copy: the caller's may be in training mode, or on another device.
            self.teacher = copy.deepcopy(context.dense).to(context.device).eval().requires_grad_(False)
            lay_out(self.teacher, self.layout)

        self.step = 0
        self.loss_sum, self.seen = 0.0, 0  # over the samples of this epoch
        self.unseen: list[tuple[Tensor, int]] = []  # losses not looked at yet, each with its number of samples
        self.history: list[dict[str, float]] = []
        self.earlier_s = 0.0
        self.notes: list[str] = []
        self.settled = True

    def run(self) -> Recovered:
        """From the beginning, or from the checkpoint, to the last step."""
        self.began = self.saved = time.perf_counter()
        checkpoint = self._checkpoint_to_go_on_from()
        if checkpoint is None and self.recipe.recalibrate:
            recalibrated = RECOVERIES["recalibrate_norm"]().recover(self.model, self.context)
            self.model = recalibrated.model
            self.notes += recalibrated.notes
        self._prepare()
        if checkpoint is not None:
            self._restore(checkpoint)
        self.context.progress.start(self.steps, "batches", "fine-tuning", done=self.step)
        try:
            with held_back_interrupt() as interrupted:
                while self.step < self.steps:
                    self._rest_of_epoch(interrupted)
        except KeyboardInterrupt:
            if self.settled:
                with contextlib.suppress(MetapruneError):  # the interrupt is what counts
                    self._save()
            raise
        finally:
            self.context.progress.close()
        self.optimizer.zero_grad(set_to_none=True)
        lay_out(self.model, torch.contiguous_format)
        return Recovered(self.model, self.earlier_s, tuple(self.history), tuple(self.notes))

    def _prepare(self) -> None:
        self.model.train()
        lay_out(self.model, self.layout)
        groups = weight_decay_groups(self.model, self.recipe.weight_decay)
        self.optimizer = torch.optim.SGD(groups, self.recipe.lr, self.recipe.momentum, nesterov=True)
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
        for batch in itertools.islice(batches, self.epoch_steps - first):
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
                last = self.history[-1]
                self.context.metrics({name: last[name] for name in ("train/loss", "lr", "images_per_s")}, epoch + 1)
            if closes or time.perf_counter() - self.saved >= self.recipe.checkpoint_seconds:
                self._save()
            if interrupted():
                raise KeyboardInterrupt
        if self.step < (epoch + 1) * self.epoch_steps:
            raise InputError(
                f"{len(self.train)} samples must give {self.epoch_steps} batches of {self.batch_size}, but there were "
                f"{self.step - epoch * self.epoch_steps}. Look at what `batches` of the training data yields."
            )

    def _one_step(self, batch: Batch) -> None:
        torch.manual_seed(_derived(self.context.seed, "step", self.step))  # for dropout
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate(self.step, self.steps)
        batch = in_layout(on_device(batch, self.context.device), self.layout)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with torch.autocast(self.context.device.type, self.dtype, enabled=self.dtype is not None):
                loss = self.recipe.loss(self.model, self.teacher, batch, self.context.task)
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
        for name, parameter in self.model.named_parameters():
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum/{name}"] = momentum
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
                if f"momentum/{name}" in tensors:
                    momentum = torch.empty_like(parameter).copy_(tensors[f"momentum/{name}"])
                    self.optimizer.state[parameter]["momentum_buffer"] = momentum
        self.step, self.loss_sum, self.seen = state["step"], state["loss_sum"], state["seen"]
        self.history, self.earlier_s = state["history"], state["seconds"]
        self.notes = [*state["notes"], f"went on at step {self.step} of {self.steps}"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


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
