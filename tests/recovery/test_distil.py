import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from metaprune.errors import ConfigError
from metaprune.recovery import Context, Distil
from metaprune.recovery.distil import Features, feature_loss
from metaprune.task import Classification

QUICK = Distil(epochs=2, batch_size=64, precision="fp32")


def pair(seed: int, layers: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    make = lambda: {str(k): torch.randn(4, k + 2, generator=generator).double() for k in range(layers)}  # noqa: E731
    return make(), make()


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_that_is_rescaled_in_both_networks_changes_nothing(seed):
    own, wanted = pair(seed)
    loss = feature_loss(own, wanted)
    for layer in own:
        scaled = ({**each, layer: each[layer] * 37.5} for each in (own, wanted))
        torch.testing.assert_close(feature_loss(*scaled), loss)


def test_every_layer_weighs_the_same():
    """``alpha_l ||T_l||^2`` is equal for all layers: a layer that gives nothing costs 1 / L, whatever its size."""
    own, wanted = pair(0)
    for layer in own:
        without = {**wanted, layer: torch.zeros_like(wanted[layer])}
        assert float(feature_loss(without, wanted)) == pytest.approx(1 / len(own))
    assert float(feature_loss(wanted, wanted)) == 0


def test_the_loss_is_its_parts_summed(damaged: nn.Module, context: Context, digits):
    batch, task = next(digits.train.batches(32)), Classification()
    context = replace(context, task=task)

    def loss(**options: float) -> Tensor:
        return replace(QUICK, **options).lesson(copy.deepcopy(damaged), context).loss(batch).detach()

    features = loss(distil=1.0, features=1.0) - loss(distil=1.0, features=0.0)
    torch.testing.assert_close(loss(distil=0.0, features=0.0), task.step(damaged, batch).detach())
    mixed = 0.7 * loss(distil=0.0, features=0.0) + 0.3 * loss(distil=1.0, features=0.0) + 2 * features
    torch.testing.assert_close(loss(distil=0.3, features=2.0), mixed)
    own, known = Features(damaged, ["block1"]), Features(context.dense, ["block1"])
    with own, known, torch.no_grad():
        damaged(batch[0]), context.dense(batch[0])
    expected = (own.seen["block1"] - known.seen["block1"]).square().sum() / known.seen["block1"].square().sum()
    only = replace(QUICK, layers=("block1",))
    taught = only.lesson(copy.deepcopy(damaged), context).loss(batch) - replace(only, features=0.0).lesson(
        copy.deepcopy(damaged), context
    ).loss(batch)
    torch.testing.assert_close(taught.detach(), expected)


def test_features_bring_features_nearer(damaged, context, trained, digits):
    images = digits.validation.images()

    def distance(recipe: Distil) -> float:
        model = recipe.recover(damaged, context).model
        with Features(model, ["block1"]) as own, Features(trained, ["block1"]) as known, torch.no_grad():
            model(images), trained(images)
        return float(feature_loss(own.seen, known.seen))

    base = replace(QUICK, distil=0.0)
    assert distance(replace(base, features=3.0, layers=("block1",))) < distance(replace(base, features=0.0))


def test_no_labels_are_read_at_one(damaged, context):
    class NoLoss(Classification):
        def loss(self, outputs, batch):
            raise AssertionError

    recovered = replace(QUICK, epochs=1, distil=1.0).recover(damaged, replace(context, task=NoLoss()))
    assert recovered.history[0]["train/loss"] > 0


class Tiny(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x.flatten(1)[:, :64]).relu())


def test_layers_of_other_widths_are_left_out(context):
    recipe = replace(QUICK, epochs=1, recalibrate=False)
    context = replace(context, dense=Tiny(12))
    assert recipe.lesson(Tiny(7), context).layers == ("down",)
    with pytest.raises(ConfigError, match=r"'up' gives .*7.* and .*12.*\. Name another layer, or none"):
        replace(recipe, layers=("up",)).recover(Tiny(7), context)
    with pytest.raises(ConfigError, match="'nowhere' is none"):
        replace(recipe, layers=("nowhere",)).recover(Tiny(7), context)


@pytest.mark.parametrize("options", [{"distil": 1.1}, {"features": -1.0}, {"temperature": 0.0}])
def test_bad_options(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Distil(**options)
