"""Magnitudes comparable over layers."""

import torch

from metaprune import zoo
from metaprune.criteria import CRITERIA, Calibration
from metaprune.criteria.lamp import lamp
from metaprune.graph import trace
from tests.criteria.nets import scored, two_layers


def test_it_is_the_published_quotient() -> None:
    norm = torch.tensor([3.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(lamp(norm), torch.tensor([1.0, 1 / 18, 4 / 17, 4 / 17], dtype=torch.float64))


def test_the_scale_of_a_layer_plays_no_part() -> None:
    model = two_layers()
    before = scored("lamp", model)
    with torch.no_grad():
        model[0].weight.mul_(6)
        model[0].bias.mul_(6)
    torch.testing.assert_close(scored("lamp", model), before)


def test_the_largest_unit_of_every_axis_is_worth_one_and_order_is_that_of_norms() -> None:
    net = trace(zoo.build("cifar_resnet8"), zoo.example_inputs("cifar_resnet8"))
    scores, norms = (CRITERIA[name]().score(net, Calibration()) for name in ("lamp", "l2"))
    for axis, score_U in scores.items():
        assert float(score_U.max()) == 1
        assert torch.equal(score_U.argsort(), norms[axis].argsort())
