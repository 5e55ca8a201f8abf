"""Curvature along units."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaprune import zoo
from metaprune.criteria import CRITERIA, Calibration
from metaprune.errors import ConfigError
from metaprune.graph import trace
from metaprune.task import Classification
from tests.criteria.nets import LABELS, hidden, scored, squared, two_layers


def test_where_units_do_not_meet_one_probe_is_exact() -> None:
    """Each output reads one unit, and the loss is a sum of squares: the curvature is w^2 E[x^2]."""
    model = two_layers(nn.Tanh(), units=4)
    with torch.no_grad():
        model[2].weight.copy_(torch.diag(model[2].weight.diag()))
        model[2].bias.zero_()
    expected = model[2].weight.diag().detach().double().square() * hidden(model).square().mean(0) / 2
    torch.testing.assert_close(scored("hessian", model, squared(), probes=1), expected, rtol=1e-5, atol=1e-9)


def test_many_probes_find_the_diagonal() -> None:
    model = two_layers(nn.Tanh())
    x = hidden(model).float()

    def loss(gate: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model[2](x * gate), LABELS)

    exact = torch.func.hessian(loss)(torch.ones(7)).diag().double()
    torch.testing.assert_close(scored("hessian", model, probes=600), exact.abs() / 2, rtol=0.05, atol=1e-3)


def test_attention_has_second_derivatives() -> None:
    net = trace(zoo.build("vit_tiny"), zoo.example_inputs("vit_tiny"))
    x = zoo.example_inputs("vit_tiny")
    given = Calibration(lambda: iter([(x, torch.arange(len(x)))]), Classification())
    scores = CRITERIA["hessian"]().score(net, given)
    assert set(scores) == {axis.name for axis in net.axes if axis.prunable and axis.consumers}


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="must hold"):
        scored("hessian", two_layers(), probes=0)
