"""Shares from shapes."""

import pytest

from metaprune import zoo
from metaprune.allocate.erk import density
from metaprune.graph import trace
from tests.allocate.problems import allocated, chain, drawn


def test_shares_are_in_proportion_to_sums_over_products() -> None:
    net = chain(40, 40, 80, 40, 10)
    kept = allocated("erk", net, drawn(net), 0.3)
    raw = {name: density(net, net.axis(name)) for name in kept}
    scale = [kept[name] / net.axis(name).size / raw[name] for name in kept]
    assert max(scale) / min(scale) == pytest.approx(1, abs=0.15)  # units are whole


def test_the_formula_counts_kernels() -> None:
    net = trace(zoo.build("digits_cnn"), zoo.example_inputs("digits_cnn"))
    assert density(net, net.axis("block2.conv1")) == (32 + 32 + 3 + 3) / (32 * 32 * 9)
