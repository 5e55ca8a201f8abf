import json
import math
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor, nn

from metaprune import zoo
from metaprune.data import Dataset
from metaprune.errors import ConfigError, InputError, ResourceError
from metaprune.measure import accuracy
from metaprune.recovery import Context, Finetune, NoProgress, Recovered
from metaprune.recovery._interrupt import held_back_interrupt
from metaprune.recovery._training import distillation, weight_decay_groups
from metaprune.task import Classification, CustomLoss

CHECKPOINT = "finetune.safetensors"
QUICK = Finetune(epochs=3, batch_size=64, checkpoint_seconds=0)  # 8 steps an epoch, 24 in all


class CallAt(NoProgress):
    """Calls a function once, after a number of steps."""

    def __init__(self, step: int, call: Callable[[], object]) -> None:
        self.step, self.call, self.began_at, self.ended_at = step, call, -1, -1

    def start(self, total: int, unit: str, description: str, done: int = 0) -> None:
        if unit == "batches":
            self.began_at = self.ended_at = done

    def advance(self, amount: int = 1, status: str = "") -> None:
        self.ended_at += amount
        if self.began_at >= 0 and self.ended_at == self.step:
            self.call()


def interrupt() -> None:
    raise KeyboardInterrupt


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def weights(recovered: Recovered) -> dict[str, Tensor]:
    return recovered.model.state_dict()


def assert_same(first: Recovered, second: Recovered) -> None:
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, weights(second)[name]), name
    assert [entry["train/loss"] for entry in first.history] == [entry["train/loss"] for entry in second.history]


def saved_step(folder: Path) -> int:
    with safe_open(folder / CHECKPOINT, framework="pt") as file:
        return json.loads(file.metadata()["checkpoint"])["state"]["step"]


class TestResult:
    def test_a_damaged_network_is_healed(self, damaged: nn.Module, context: Context, digits: Dataset) -> None:
        before = accuracy(damaged, digits.test).top1
        recovered = Finetune(epochs=8).recover(damaged, replace(context, train=digits.train))
        after = accuracy(recovered.model, digits.test).top1
        assert before < 80 < 90 < after

    def test_a_teacher_brings_the_outputs_nearer(self, damaged, context, trained, digits):
        def distance(**options: Any) -> float:
            model = Finetune(epochs=3, **options).recover(damaged, context).model
            images = digits.validation.images()
            return float(F.mse_loss(model(images), trained(images)).detach())

        assert distance(distil=0.9) < distance()

    def test_without_labels(self, damaged: nn.Module, context: Context) -> None:
        def no_loss(outputs: Tensor, labels: Tensor) -> Tensor:
            raise AssertionError

        recovered = Finetune(epochs=1, distil=1.0).recover(damaged, replace(context, task=CustomLoss(no_loss)))
        assert recovered.history[0]["train/loss"] > 0

    def test_a_teacher_in_training_mode_teaches_the_same(self, damaged, context, trained):
        recipe = replace(QUICK, epochs=1, distil=0.5)
        wanted = recipe.recover(damaged, context)
        trained.train()
        try:
            assert_same(wanted, recipe.recover(damaged, context))
        finally:
            trained.eval()

    def test_history_and_metrics(self, damaged: nn.Module, context: Context) -> None:
        seen: list[tuple[dict[str, float], int]] = []
        context = replace(context, metrics=lambda values, step: seen.append((dict(values), step)))
        recovered = QUICK.recover(damaged, context)
        assert [entry["epoch"] for entry in recovered.history] == [1, 2, 3]
        assert [step for _, step in seen] == [1, 2, 3]
        for (values, _), entry in zip(seen, recovered.history):
            assert values == {name: entry[name] for name in ("train/loss", "lr", "images_per_s")}
        losses = [entry["train/loss"] for entry in recovered.history]
        assert losses == sorted(losses, reverse=True)

    def test_steps_are_those_of_a_slow_reference(self) -> None:
        """Nesterov's momentum, decay, cosine and warm-up by hand, in float64; one batch holds all samples."""
        recipe = Finetune(
            epochs=5, lr=0.1, batch_size=99, weight_decay=0.1, warmup=0.4, augment=False, precision="fp32"
        )
        values, labels = torch.randn(12, 4).double(), torch.arange(12) % 3
        model = nn.Linear(4, 3).double()
        context = Context(train=Samples(values, labels))
        recovered = recipe.recover(model, context).model

        weight, bias = (p.detach().clone() for p in (model.weight, model.bias))
        momenta = [torch.zeros_like(weight), torch.zeros_like(bias)]
        rates = [0.05, 0.1, *(0.05 * (1 + math.cos(math.pi * k / 3)) for k in range(3))]
        for rate in rates:
            onehot = F.one_hot(labels, 3).double()
            error = ((values @ weight.T + bias).softmax(1) - onehot) / 12
            gradients = [error.T @ values + 0.1 * weight, error.sum(0)]
            for k, (parameter, gradient) in enumerate(zip((weight, bias), gradients)):
                momenta[k] = 0.9 * momenta[k] + gradient
                parameter -= rate * (gradient + 0.9 * momenta[k])
        torch.testing.assert_close(recovered.weight.detach(), weight, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(recovered.bias.detach(), bias, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_clipped_steps_are_short(self, precision, damaged, context):
        recipe = Finetune(epochs=1, batch_size=512, clip=1e-3, weight_decay=0, warmup=0, precision=precision)
        recovered = recipe.recover(damaged, context)
        moved = torch.cat(
            [(a - b).detach().flatten() for a, b in zip(recovered.model.parameters(), damaged.parameters())]
        )
        assert float(moved.norm()) == pytest.approx(1e-3 * 0.01 * 1.9, rel=1e-3)  # lr, 1 + momentum

    def test_batch_norm_is_re_estimated_first(self, damaged: nn.Module, context: Context) -> None:
        tiny = Finetune(epochs=1, lr=1e-12, batch_size=512, momentum=1e-6)
        with_it = tiny.recover(damaged, context)
        without = replace(tiny, recalibrate=False).recover(damaged, replace(context, calibration=None))
        assert accuracy_of(with_it, context) > accuracy_of(without, context)

    def test_frozen_parameters_stay(self, damaged: nn.Module, context: Context) -> None:
        damaged.linear.requires_grad_(False)
        recovered = QUICK.recover(damaged, context)
        assert torch.equal(recovered.model.linear.weight, damaged.linear.weight)
        assert not torch.equal(recovered.model.conv1.weight, damaged.conv1.weight)

    def test_images_by_pixel_give_the_same_network(self, damaged: nn.Module, context: Context) -> None:
        one, other = (
            replace(QUICK, epochs=1, precision="fp32", channels_last=layout).recover(damaged, context)
            for layout in (True, False)
        )
        torch.testing.assert_close(weights(one), weights(other), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_mixed_precision(self, precision, damaged, context):
        recovered = replace(QUICK, precision=precision).recover(damaged, context)
        full = replace(QUICK, precision="fp32").recover(damaged, context)
        assert f"mixed precision: {PRECISION_NAMES[precision]}" in recovered.notes
        assert {tensor.dtype for tensor in recovered.model.parameters()} == {torch.float32}
        assert recovered.history[-1]["train/loss"] == pytest.approx(full.history[-1]["train/loss"], rel=0.05)

    @pytest.mark.parametrize("name", list(zoo.MODELS))
    def test_every_network_of_the_zoo_takes_a_step(self, name: str) -> None:
        model, inputs = zoo.build(name).eval(), zoo.example_inputs(name)
        with torch.no_grad():
            outputs = model(inputs)
        task = CustomLoss(lambda given, wanted: F.mse_loss(given, wanted.to(given.dtype)))
        samples = Samples(inputs, outputs + 1)
        context = Context(train=samples, calibration=lambda: samples.batches(2), task=task)
        recovered = Finetune(epochs=1, lr=1e-4).recover(model, context)
        assert recovered.history[0]["train/loss"] > 0


PRECISION_NAMES = {"bf16": "bfloat16", "fp16": "float16"}


def accuracy_of(recovered: Recovered, context: Context) -> float:
    return accuracy(recovered.model, context.train).top1  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Samples:
    """Training data of one shuffled pass; augmentation does nothing."""

    inputs: Tensor
    targets: Tensor
    lost: int = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def batches(
        self, batch_size: int, *, shuffle: torch.Generator | None = None, start: int = 0, **_: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self), generator=shuffle) if shuffle else torch.arange(len(self))
        for part in order.split(batch_size)[start : len(order) // batch_size - self.lost]:
            yield self.inputs[part], self.targets[part]


class TestLosses:
    @given(st.integers(1, 5), st.integers(2, 6), st.floats(0.5, 20), st.integers(0, 99))
    def test_distillation_is_a_divergence_summed_by_hand(self, n: int, classes: int, T: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        logits, wanted = (3 * torch.randn(n, classes, generator=generator).double() for _ in range(2))
        total = 0.0
        for row in range(n):
            own = [math.exp(float(z) / T) for z in logits[row]]
            his = [math.exp(float(z) / T) for z in wanted[row]]
            for a, b in zip(own, his):
                p, q = b / sum(his), a / sum(own)
                total += p * math.log(p / q)
        assert float(distillation(logits, wanted, T)) == pytest.approx(T * T * total / n, rel=1e-8, abs=1e-12)

    def test_positions_count_like_samples(self) -> None:
        logits, wanted = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
        flat = distillation(logits.view(6, 5), wanted.view(6, 5), 2.0)
        torch.testing.assert_close(distillation(logits, wanted, 2.0), flat)

    def test_the_sum_of_both(self, damaged: nn.Module, trained: nn.Module, digits: Dataset) -> None:
        batch, task = next(digits.train.batches(32)), Classification(label_smoothing=0.1)
        context = Context(task=task, dense=trained)
        parts = [Finetune(distil=a).lesson(damaged, context).loss(batch) for a in (0.0, 0.3, 1.0)]
        torch.testing.assert_close(parts[1], 0.7 * parts[0] + 0.3 * parts[2])
        torch.testing.assert_close(parts[0], task.step(damaged, batch))
        torch.testing.assert_close(parts[2], distillation(damaged(batch[0]), trained(batch[0]), 4.0))

    def test_a_teacher_of_another_shape_is_refused(self, damaged: nn.Module, context: Context) -> None:
        context = replace(context, dense=zoo.build("digits_cnn", num_classes=7))
        with pytest.raises(InputError, match=r"one shape .* \(64, 10\) and a tensor of shape \(64, 7\)"):
            replace(QUICK, distil=0.5).recover(damaged, context)


class TestSchedule:
    @given(st.integers(1, 400), st.floats(0, 0.99), st.floats(1e-4, 10))
    def test_it_rises_then_falls(self, steps: int, warmup: float, lr: float) -> None:
        recipe = Finetune(lr=lr, warmup=warmup)
        rates = [recipe.learning_rate(step, steps) for step in range(steps)]
        rising = int(warmup * steps)
        assert rates[:rising] == sorted(rates[:rising])
        assert rates[rising:] == sorted(rates[rising:], reverse=True)
        assert max(rates) == pytest.approx(lr)
        assert min(rates) > 0

    def test_norms_and_biases_do_not_decay(self) -> None:
        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)
                self.norm = nn.BatchNorm2d(4)
                self.plane = nn.LayerNorm((5, 5))  # a norm whose weight has two dimensions
                self.linear = nn.Linear(4, 2)
                self.tied = self.linear
                self.scale = nn.Parameter(torch.ones(4))
                self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)

        model = Odd()
        decaying, rest = weight_decay_groups(model, 0.01)
        assert [decaying["weight_decay"], rest["weight_decay"]] == [0.01, 0.0]
        assert [id(p) for p in decaying["params"]] == [id(model.conv.weight), id(model.linear.weight)]
        names = {id(p): name for name, p in model.named_parameters()}
        assert sorted(names[id(p)] for p in rest["params"]) == [
            "conv.bias",
            "linear.bias",
            "norm.bias",
            "norm.weight",
            "plane.bias",
            "plane.weight",
            "scale",
        ]


class TestResume:
    @pytest.mark.parametrize(
        ("step", "stop"), [(1, ctrl_c), (5, interrupt), (8, ctrl_c), (9, interrupt), (16, interrupt), (24, ctrl_c)]
    )
    def test_in_any_step(self, step, stop, damaged, context, tmp_path):
        whole = QUICK.recover(damaged, context)
        context = replace(context, folder=tmp_path / "made")
        with pytest.raises(KeyboardInterrupt):
            replace(QUICK, checkpoint_seconds=999).recover(damaged, replace(context, progress=CallAt(step, stop)))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert saved_step(tmp_path / "made") == step
        watcher = CallAt(-1, interrupt)
        resumed = QUICK.recover(damaged, replace(context, resume=True, progress=watcher))
        assert (watcher.began_at, watcher.ended_at) == (step, 24)
        assert resumed.notes[-1] == f"went on at step {step} of 24"
        assert_same(whole, resumed)

    @pytest.mark.parametrize("step", [8, 12, 16])
    def test_no_epoch_is_missed_by_who_looks_on(self, step, damaged, context, tmp_path):
        seen: list[tuple[int, Tensor]] = []

        def look(model: nn.Module, epoch: int) -> None:
            seen.append((epoch, next(model.parameters()).detach().clone()))

        context = replace(context, after_epoch=look)
        QUICK.recover(damaged, context)
        whole = seen.copy()
        assert [epoch for epoch, _ in whole] == [1, 2, 3]
        seen.clear()
        stopped = replace(context, folder=tmp_path, progress=CallAt(step, interrupt))
        with pytest.raises(KeyboardInterrupt):
            replace(QUICK, checkpoint_seconds=999).recover(damaged, stopped)
        QUICK.recover(damaged, replace(context, folder=tmp_path, resume=True))
        assert [epoch for epoch, _ in seen] == [1, 2, 3]
        assert all(torch.equal(weight, other) for (_, weight), (_, other) in zip(whole, seen))

    def test_an_interrupt_within_a_step_waits_for_its_end(self, damaged, context, tmp_path):
        calls = []

        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 5:
                ctrl_c()
            return F.cross_entropy(outputs, labels)

        context = replace(context, folder=tmp_path, task=CustomLoss(loss))
        with pytest.raises(KeyboardInterrupt):
            QUICK.recover(damaged, context)
        assert saved_step(tmp_path) == len(calls) == 5
        resumed = QUICK.recover(damaged, replace(context, resume=True))
        assert_same(QUICK.recover(damaged, replace(context, folder=None)), resumed)

    def test_an_interrupt_that_cannot_be_held_back_keeps_the_last_whole_step(self, damaged, context, tmp_path):
        calls = []

        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            calls.append(1)
            if len(calls) == 5:
                interrupt()
            return F.cross_entropy(outputs, labels)

        context = replace(context, folder=tmp_path, task=CustomLoss(loss))
        with pytest.raises(KeyboardInterrupt):
            QUICK.recover(damaged, context)
        assert saved_step(tmp_path) == 4
        resumed = QUICK.recover(damaged, replace(context, resume=True))
        assert_same(QUICK.recover(damaged, replace(context, folder=None)), resumed)

    def test_the_scale_of_the_loss_is_kept(self, damaged, context, tmp_path):
        recipe = replace(QUICK, precision="fp16", lr=1e-4)
        context = replace(context, task=CustomLoss(lambda given, labels: 2000 * F.cross_entropy(given, labels)))
        whole = recipe.recover(damaged, context)
        context = replace(context, folder=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            recipe.recover(damaged, replace(context, progress=CallAt(11, ctrl_c)))
        with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
            scale = json.loads(file.metadata()["checkpoint"])["state"]["scaler"]["scale"]
        assert scale < 2**16  # gradients overflowed, so that the next steps hang on what is kept
        assert_same(whole, recipe.recover(damaged, replace(context, resume=True)))

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_with_dropout_clipping_a_teacher_and_loss_scaling(self, precision, damaged, context, trained, tmp_path):
        model = nn.Sequential(damaged, nn.Dropout(0.3))
        recipe = replace(QUICK, precision=precision, clip=1.0, distil=0.5)
        context = replace(context, dense=nn.Sequential(trained, nn.Dropout(0.3)))
        whole = recipe.recover(model, context)
        context = replace(context, folder=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            recipe.recover(model, replace(context, progress=CallAt(11, ctrl_c)))
        assert_same(whole, recipe.recover(model, replace(context, resume=True)))

    def test_tied_weights(self, tmp_path: Path) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
                self.decode.weight = self.encode.weight

            def forward(self, x: Tensor) -> Tensor:
                return self.decode(self.encode(x))

        model = Tied()
        context = Context(train=Samples(torch.randn(64, 4), torch.arange(64) % 4))
        recipe = replace(QUICK, batch_size=16)
        whole = recipe.recover(model, context)
        context = replace(context, folder=tmp_path)
        with pytest.raises(KeyboardInterrupt):
            recipe.recover(model, replace(context, progress=CallAt(6, ctrl_c)))
        resumed = recipe.recover(model, replace(context, resume=True))
        assert resumed.model.decode.weight is resumed.model.encode.weight
        assert_same(whole, resumed)

    def test_a_finished_run_is_only_read(self, damaged, context, tmp_path):
        context = replace(context, folder=tmp_path)
        whole = QUICK.recover(damaged, context)
        metrics: list[int] = []
        again = QUICK.recover(damaged, replace(context, resume=True, metrics=lambda _, step: metrics.append(step)))
        assert_same(whole, again)
        assert metrics == []
        assert again.seconds > whole.seconds / 2

    def test_without_a_checkpoint_it_starts_from_the_beginning(self, damaged, context, tmp_path):
        resumed = QUICK.recover(damaged, replace(context, folder=tmp_path, resume=True))
        assert_same(QUICK.recover(damaged, context), resumed)

    def test_the_check_takes_the_network_before_the_cut(self, damaged, context, tmp_path):
        context = replace(context, folder=tmp_path)
        QUICK.recover(damaged, context)
        QUICK.check(zoo.build("digits_cnn"), replace(context, resume=True))

    def test_a_fresh_start_forgets_the_checkpoint_of_other_work(self, damaged, context, tmp_path):
        context = replace(context, folder=tmp_path)
        QUICK.recover(damaged, context)
        recipe = replace(QUICK, checkpoint_seconds=999, lr=0.02)
        with pytest.raises(RuntimeError):
            recipe.recover(damaged, replace(context, progress=CallAt(3, fail)))
        assert not (tmp_path / CHECKPOINT).exists()

    def test_leftovers_of_a_kill_are_removed(self, damaged, context, tmp_path):
        leftover = tmp_path / f".{CHECKPOINT}.abc123"
        leftover.write_bytes(b"half a check")
        QUICK.recover(damaged, replace(context, folder=tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]

    def test_time_between_checkpoints(self, damaged, context, tmp_path):
        written = []

        class Watch(CallAt):
            def advance(self, amount: int = 1, status: str = "") -> None:
                super().advance()
                written.append((tmp_path / CHECKPOINT).exists())

        context = replace(context, folder=tmp_path, progress=Watch(-1, interrupt))
        replace(QUICK, checkpoint_seconds=999).recover(damaged, context)
        assert written == [False] * 9 + [True] * 16  # a pass of recalibration; after the first epoch


def fail() -> None:
    raise RuntimeError


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"recipe": replace(QUICK, lr=0.02)}, r"lr was 0.01 and is now 0.02"),
            ({"recipe": replace(QUICK, distil=0.5)}, r"distil was 0.0 and is now 0.5.*dense was null"),
            ({"recipe": replace(QUICK, clip=1.0)}, r"clip was null and is now 1.0"),
            ({"seed": 9}, r"seed was 0 and is now 9"),
            ({"task": Classification(label_smoothing=0.1)}, r"task label_smoothing was 0.0 and is now 0.1"),
            ({"task": CustomLoss(F.nll_loss)}, r"task class was .*Classification.*task function was null"),
            ({"samples": 300}, r"work: samples was 512 and is now 300\. Give"),
            ({"first": 1}, r"work: data was \"[0-9a-f]{64}\" and is now"),
            ({"widths": (8, 12)}, r"shape of conv2.weight was \[16, 8, 3, 3\] and is now \[12, 8, 3, 3\].*more"),
            ({"weight": 0.5}, r"weights was \"[0-9a-f]{64}\" and is now"),
        ],
    )
    def test_a_checkpoint_of_other_work(self, changes, message, damaged, context, digits, tmp_path):
        context = replace(context, folder=tmp_path)
        QUICK.recover(damaged, context)
        kept = (tmp_path / CHECKPOINT).read_bytes()
        model = damaged
        if "widths" in changes:
            model = zoo.build("digits_cnn", widths=changes["widths"])
        if "weight" in changes:
            nn.init.constant_(model.conv1.weight, changes["weight"])
        train = digits.train.subset(changes.get("samples", 512), changes.get("first", 0))
        context = replace(
            context, resume=True, train=train, seed=changes.get("seed", 0), task=changes.get("task", context.task)
        )
        with pytest.raises(ConfigError, match=message):
            changes.get("recipe", QUICK).recover(model, context)
        assert (tmp_path / CHECKPOINT).read_bytes() == kept

    def test_a_damaged_checkpoint(self, damaged, context, tmp_path):
        QUICK.recover(damaged, replace(context, folder=tmp_path))
        path = tmp_path / CHECKPOINT
        for content in (b"", b"nothing", path.read_bytes()[:-7]):
            path.write_bytes(content)
            with pytest.raises(InputError, match="must be a checkpoint"):
                QUICK.recover(damaged, replace(context, folder=tmp_path, resume=True))

    @pytest.mark.parametrize("at", [1, 12, 24])
    def test_a_loss_that_is_not_finite(self, at, damaged, context, tmp_path):
        calls = []

        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            calls.append(1)
            return F.cross_entropy(outputs, labels) * (float("nan") if len(calls) == at else 1)

        context = replace(context, folder=tmp_path, task=CustomLoss(loss))
        with pytest.raises(InputError, match=rf"the loss is nan at step {at} of 24.*lower `lr` \(it was 0.01\)"):
            QUICK.recover(damaged, context)
        assert (saved_step(tmp_path) if at > 1 else 0) == at - 1

    def test_a_step_that_breaks_the_weights(self, damaged, context, tmp_path):
        recipe = replace(QUICK, lr=1e38, warmup=0, precision="fp32", checkpoint_seconds=999)
        with pytest.raises(InputError, match=r"not finite|the loss is (nan|inf)"):
            recipe.recover(damaged, replace(context, folder=tmp_path))
        assert not (tmp_path / CHECKPOINT).exists()

    def test_a_full_disk(self, damaged, context, tmp_path, monkeypatch):
        def full(path: Path, content: bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("metaprune.recovery._checkpoint.write_atomically", full)
        with pytest.raises(ResourceError, match="No space left"):
            QUICK.recover(damaged, replace(context, folder=tmp_path))

    def test_data_that_end_early(self):
        context = Context(train=Samples(torch.randn(64, 4), torch.arange(64) % 3, lost=1))
        with pytest.raises(InputError, match="must give 4 batches of 16, but there were 3"):
            replace(QUICK, batch_size=16).recover(nn.Linear(4, 3), context)

    def test_nothing_to_train(self, damaged, context):
        with pytest.raises(ConfigError, match="all have requires_grad=False"):
            QUICK.recover(damaged.requires_grad_(False), context)

    def test_no_samples(self, damaged, context):
        with pytest.raises(ConfigError, match="there are none"):
            QUICK.recover(damaged, replace(context, train=Samples(torch.zeros(0, 1), torch.zeros(0))))

    def test_no_teacher(self, damaged, context):
        with pytest.raises(ConfigError, match="dense network to be near to"):
            replace(QUICK, distil=0.5).recover(damaged, replace(context, dense=None))

    @pytest.mark.parametrize(
        "option",
        [
            {"epochs": 0},
            {"lr": 0.0},
            {"lr": math.inf},
            {"batch_size": 0},
            {"momentum": 1.0},
            {"weight_decay": -1.0},
            {"warmup": 1.0},
            {"clip": 0.0},
            {"distil": 1.5},
            {"temperature": 0.0},
            {"precision": "int8"},
            {"channels_last": "yes"},
            {"checkpoint_seconds": -1.0},
        ],
    )
    def test_options_out_of_range(self, option):
        (name, value), *_ = option.items()
        with pytest.raises(ConfigError, match=rf"{name}.* must hold, but {name}={value!r}"):
            Finetune(**option)


class TestHeldBackInterrupt:
    def heard(self, *acts: Callable[[], object]) -> list[bool]:
        """What was asked after each act, as far as it came."""
        self.answers: list[bool] = []
        with held_back_interrupt() as asked:
            for act in acts:
                act()
                self.answers.append(asked())
        return self.answers

    def test_the_second_is_raised_at_once(self):
        with pytest.raises(KeyboardInterrupt):
            self.heard(list, ctrl_c, ctrl_c, list)
        assert self.answers == [False, True]

    def test_one_that_nobody_acted_upon_is_raised_at_the_end(self):
        with pytest.raises(KeyboardInterrupt):
            self.heard(ctrl_c, list)
        assert self.answers == [True, True]

    def test_another_error_goes_first(self):
        with pytest.raises(RuntimeError):
            self.heard(ctrl_c, fail)

    def test_a_program_with_its_own_handler_keeps_it(self):
        heard = []
        before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
        try:
            with held_back_interrupt() as asked:
                ctrl_c()
                assert not asked()
        finally:
            signal.signal(signal.SIGINT, before)
        assert heard == [1]

    def test_in_another_thread_it_does_nothing(self):
        answers = []

        def work() -> None:
            with held_back_interrupt() as asked:
                answers.append(asked())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert answers == [False]


CHILD = """
import hashlib, sys
from pathlib import Path
import torch
from metaprune import zoo
from metaprune.data import from_arrays
from metaprune.recovery import Context, Finetune, NoProgress

class Tell(NoProgress):
    def advance(self, amount=1, status=""):
        print("step", flush=True)

torch.set_num_threads(1)
torch.manual_seed(0)
model = zoo.build("digits_cnn", widths=(4, 8))
images, labels = torch.randn(1200, 1, 8, 8), torch.arange(1200) % 10
splits = {name: (images, labels, torch.arange(1200)) for name in ("train", "validation", "test")}
train = from_arrays("noise", "noise", splits, classes=tuple("0123456789"), scale=1.0).train
context = Context(train=train, calibration=lambda: train.subset(256, 0).batches(64), folder=Path(sys.argv[1]),
                  resume=sys.argv[2] == "resume", progress=Tell())
recovered = Finetune(epochs=3, batch_size=32, checkpoint_seconds=0).recover(model, context)
digest = hashlib.sha256()
for name, tensor in recovered.model.state_dict().items():
    digest.update(name.encode() + tensor.numpy().tobytes())
print("done", recovered.notes[-1:], digest.hexdigest(), flush=True)
"""


def test_sigkill_in_any_moment_costs_nothing(tmp_path: Path) -> None:
    def start(folder: str, how: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-W", "error", "-c", CHILD, str(tmp_path / folder), how]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def finish(child: "subprocess.Popen[str]") -> str:
        with child:
            output = child.stdout.read()  # type: ignore[union-attr]
        assert child.returncode == 0
        return output.splitlines()[-1]

    whole = start("whole", "begin")
    chance = random.Random()
    for how in ("begin", "resume"):
        with start("killed", how) as child:
            for _ in range(chance.randint(2, 45)):
                assert child.stdout.readline() == "step\n"  # type: ignore[union-attr]
            time.sleep(chance.random() / 100)  # anywhere in a step, or in the writing of a checkpoint
            child.kill()
        assert child.returncode == -signal.SIGKILL
    resumed = finish(start("killed", "resume"))
    assert "went on at step" in resumed
    assert resumed.split()[-1] == finish(whole).split()[-1]
