import sys
import types
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaprune.errors import ConfigError, InputError
from metaprune.task import Classification, CustomLoss, FeatureMatching, Task, logits_of, resolve_task


@dataclass
class Named:
    logits: torch.Tensor


BATCH = (torch.randn(4, 3), torch.tensor([0, 1, 2, 1]))


def test_classification_is_cross_entropy() -> None:
    model = nn.Linear(3, 5)
    assert torch.equal(Classification().step(model, BATCH), F.cross_entropy(model(BATCH[0]), BATCH[1]))
    with pytest.raises(ConfigError, match="label_smoothing"):
        Classification(label_smoothing=1.0)


def test_feature_matching_needs_no_labels_and_is_zero_at_the_dense_network() -> None:
    dense = nn.Linear(3, 5)
    task = resolve_task("feature_matching", dense)
    assert isinstance(task, FeatureMatching)
    assert float(task.step(dense, (BATCH[0],)).detach()) == 0
    assert float(task.step(nn.Linear(3, 5), (BATCH[0],)).detach()) > 0


def test_the_slope_of_feature_matching_has_the_curvature_of_its_loss() -> None:
    """Its own gradient vanishes at the dense network; samples times the square of the projected one is the Hessian."""
    torch.manual_seed(0)
    dense = nn.Linear(3, 2, bias=False).double()
    task, batch = FeatureMatching(dense), (torch.randn(4, 3).double(),)
    weight = dense.weight.detach().clone().requires_grad_()
    curvature = torch.autograd.functional.hessian(
        lambda w: task.loss(F.linear(batch[0], w), batch), weight.detach(), vectorize=True
    ).reshape(6, 6)
    generator, total = torch.Generator().manual_seed(0), torch.zeros(6, 6).double()
    for _ in range(4000):
        slope = task.slope(lambda x: F.linear(x, weight), batch, generator)
        (found,) = torch.autograd.grad(slope, weight)
        total += 4 * torch.outer(found.flatten(), found.flatten()) / 4000
    assert torch.allclose(total, curvature, atol=0.05 * float(curvature.abs().max()))
    assert float(torch.autograd.grad(task.step(lambda x: F.linear(x, weight), batch), weight)[0].abs().max()) < 1e-12


@pytest.mark.parametrize("container", [lambda y: Named(y), lambda y: {"logits": y}, lambda y: (y, None), lambda y: y])
def test_feature_matching_takes_the_first_output_of_several(container) -> None:
    y = torch.randn(4, 3)
    task = FeatureMatching(lambda x: container(y))
    assert torch.equal(task.outputs(task.dense, BATCH), y)
    assert float(task.step(task.dense, BATCH)) == 0


def test_a_network_without_numbers_cannot_be_matched() -> None:
    with pytest.raises(ConfigError, match="must return a tensor of numbers, but returned a str"):
        FeatureMatching(lambda x: "no").step(lambda x: "no", BATCH)


@pytest.mark.parametrize(("task", "what"), [(Classification(), "labels"), (CustomLoss(F.mse_loss), "targets")])
def test_inputs_alone_have_no_loss_and_the_way_out_is_named(task: Task, what: str) -> None:
    with pytest.raises(InputError, match=f"needs {what}, but the batches hold inputs alone.*feature_matching"):
        task.step(nn.Linear(3, 5), BATCH[:1])


def test_a_function_is_a_loss() -> None:
    task = resolve_task(lambda outputs, targets: outputs.sum() * 0 + 7, nn.Identity())
    assert isinstance(task, CustomLoss)
    assert float(task.step(nn.Identity(), BATCH)) == 7


def test_names_tasks_and_factories_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_task(None, nn.Identity()) == Classification()
    assert resolve_task("classification", nn.Identity()) == Classification()
    own = Classification(label_smoothing=0.1)
    assert resolve_task(own, nn.Identity()) is own
    module = types.ModuleType("my_tasks")
    module.make = lambda: own  # type: ignore[attr-defined]
    module.bad = lambda: 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_tasks", module)
    assert resolve_task("my_tasks:make", nn.Identity()) is own
    with pytest.raises(ConfigError, match="must return"):
        resolve_task("my_tasks:bad", nn.Identity())
    with pytest.raises(ConfigError, match="Did you mean 'classification'"):
        resolve_task("clasification", nn.Identity())
    with pytest.raises(ConfigError, match="neither a task"):
        resolve_task("no_such_module:make", nn.Identity())


def test_a_task_is_a_loss_and_little_else() -> None:
    class Own(Task):
        def loss(self, outputs: torch.Tensor, batch: object) -> torch.Tensor:
            return outputs.mean()

    assert Own().step(nn.Identity(), BATCH) == BATCH[0].mean()


@pytest.mark.parametrize("wrap", [lambda scores: scores, lambda scores: {"logits": scores}, Named])
def test_logits_may_stand_in_a_container(wrap):
    scores = torch.randn(3, 4)
    batch = (torch.randn(3, 2), torch.tensor([0, 1, 2]))
    task = Classification()
    outputs = task.outputs(lambda x: wrap(scores), batch)
    assert outputs is scores
    assert task.loss(outputs, batch) == F.cross_entropy(scores, batch[1])


@pytest.mark.parametrize("outputs", [(torch.randn(3, 4),), {"scores": torch.randn(3, 4)}, None])
def test_a_classifier_without_logits_is_refused(outputs):
    with pytest.raises(ConfigError, match=f"`logits`, but returned a {type(outputs).__name__}"):
        logits_of(outputs)
