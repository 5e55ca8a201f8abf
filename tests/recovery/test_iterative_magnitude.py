from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metaprune.data import Dataset
from metaprune.errors import ConfigError
from metaprune.measure import accuracy
from metaprune.recovery import IterativeMagnitude

QUICK = IterativeMagnitude(epochs=3, batch_size=64, share=0.7, rounds=4)  # 8 steps an epoch


def zeros(model: torch.nn.Module) -> tuple[int, int]:
    weights = [p for p in model.parameters() if p.ndim > 1]
    return sum(int((p == 0).sum()) for p in weights), sum(p.numel() for p in weights)


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_exactly_the_share_is_zero(schedule, damaged, context):
    recovered = replace(QUICK, schedule=schedule).recover(damaged, context)
    gone, entries = zeros(recovered.model)
    assert gone == int(0.7 * entries)
    assert recovered.notes[-1] == f"{gone} of {entries} weights are zero"


def test_rounds_with_training_between_are_better_than_one_at_the_end(damaged, context, digits: Dataset):
    context = replace(context, train=digits.train)
    recipe = replace(QUICK, epochs=4, share=0.85)
    slow = recipe.recover(damaged, context).model
    last = replace(recipe, share=0.0).recover(damaged, context).model
    lesson = replace(recipe, rounds=1).lesson(last, replace(context, masks={}))
    assert zeros(slow) == zeros(lesson.model)
    assert accuracy(slow, digits.validation).top1 > accuracy(last, digits.validation).top1


@given(
    st.integers(1, 60), st.integers(1, 9), st.floats(0.05, 1), st.floats(0, 0.99), st.sampled_from(["cubic", "linear"])
)
def test_the_share_only_grows(steps, rounds, until, share, schedule):
    recipe = IterativeMagnitude(share=share, rounds=rounds, until=until, schedule=schedule)
    shares = [recipe.share_after(step, steps) for step in range(steps)]
    assert shares == sorted(shares)
    assert shares[-1] <= share + 1e-12


def test_masks_of_the_plan_count(damaged, context):
    kept = torch.ones_like(damaged.conv1.weight).bool()
    kept[0] = False
    recovered = QUICK.recover(damaged, replace(context, masks={"conv1.weight": kept}))
    assert not recovered.model.conv1.weight[0].any()


@pytest.mark.parametrize("options", [{"share": 1.0}, {"rounds": 0}, {"until": 0.0}, {"schedule": "steep"}])
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        IterativeMagnitude(**options)
