import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from metaprune import zoo
from metaprune.edits import n_of_m, unstructured
from metaprune.errors import ConfigError
from metaprune.recovery import Context, Perp

QUICK = Perp(epochs=2, batch_size=64, lr=0.01, rank=3, precision="fp32")


def masked(model: nn.Module, share: float = 0.6) -> tuple[nn.Module, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    weights = {name: p for name, p in model.named_parameters() if p.ndim > 1}
    masks = unstructured({name: p.detach().abs() for name, p in weights.items()}, share)
    with torch.no_grad():
        for name, p in weights.items():
            p.mul_(masks[name])
    return model, masks


def test_what_is_masked_stays_zero_and_the_rest_learns(damaged, context):
    model, masks = masked(damaged)
    with torch.no_grad():
        model.conv1.weight[tuple(masks["conv1.weight"].nonzero()[0])] = 0  # zeros that no mask asks for
    recovered = QUICK.recover(model, replace(context, masks=masks))
    moved = 0
    for name, kept in masks.items():
        after = recovered.model.get_parameter(name)
        assert not after[~kept].any(), name
        moved += int((after != model.get_parameter(name)).sum())
    assert moved > 0
    assert recovered.model.conv1.weight[tuple(masks["conv1.weight"].nonzero()[0])] != 0  # a true zero may learn


def test_two_of_four_survive(damaged, context):
    kept = n_of_m(damaged.get_parameter("linear.weight").abs(), "2:4", 1)
    model = copy.deepcopy(damaged)
    with torch.no_grad():
        model.linear.weight.mul_(kept)
    after = QUICK.recover(model, replace(context, masks={"linear.weight": kept})).model.linear.weight
    assert bool(((after != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def test_at_the_start_nothing_changes_and_merged_is_adapted(damaged, context, digits):
    images = digits.validation.images()[:16]
    lesson = QUICK.lesson(copy.deepcopy(damaged), context)
    with torch.no_grad():
        assert torch.equal(lesson.model(images), damaged(images))
        for parameter in lesson.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        adapted = lesson.model(images)
        assert torch.equal(lesson.finished()(images), adapted)
        assert not torch.equal(adapted, damaged(images))


def test_only_the_chosen_are_trained(damaged, context):
    lesson = QUICK.lesson(copy.deepcopy(damaged), context)
    trained = {name for name, p in lesson.model.named_parameters() if p.requires_grad}
    assert all(name.endswith(("bias", "weight", ".a", ".b")) for name in trained)
    assert not any(name.endswith("original") for name in trained)
    flat = sum(p.numel() for p in damaged.parameters() if p.ndim <= 1)
    updates = sum(
        min(3, p.shape[0], p[0].numel()) * (p.shape[0] + p[0].numel()) for p in damaged.parameters() if p.ndim > 1
    )
    total = sum(p.numel() for p in damaged.parameters())
    assert f"trains {flat + updates} numbers, {(flat + updates) / total:.2%}" in lesson.notes[0]


def test_rank_zero_trains_norms_and_biases_alone(damaged, context):
    recovered = replace(QUICK, rank=0).recover(damaged, context)
    for name, before in damaged.named_parameters():
        after = recovered.model.get_parameter(name)
        assert torch.equal(after, before) == (before.ndim > 1), name


def test_the_result_is_plain(damaged, context):
    recovered = QUICK.recover(damaged, context)
    assert not any(parametrize.is_parametrized(module) for module in recovered.model.modules())
    assert type(recovered.model) is type(damaged)


def test_tied_and_frozen_weights_are_left_alone():
    model = zoo.build("llama_tiny", tied=True)
    lesson = Perp(rank=2).lesson(model, Context())
    names = [path for path, module in model.named_modules() if parametrize.is_parametrized(module)]
    assert names
    assert not {"head", "embedding"} & set(names)
    assert lesson.finished().head.weight is lesson.finished().embedding.weight


@pytest.mark.parametrize("options", [{"rank": -1}, {"alpha": 0.0}])
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Perp(**options)


def test_nothing_to_train_is_refused(context):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    with pytest.raises(ConfigError, match="Use finetune"):
        Perp(rank=0, recalibrate=False).recover(model, context)
