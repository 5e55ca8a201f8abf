"""Sparsity as a measure of what can go."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metaprune.criteria.pq import pq_index, retained
from metaprune.errors import ConfigError
from tests.criteria.nets import scored, two_layers

VECTORS = st.lists(st.floats(0.01, 100), min_size=2, max_size=30).map(lambda entries: torch.tensor(entries).double())


@given(VECTORS)
@settings(max_examples=50, deadline=None)
def test_scale_and_copies_play_no_part_and_the_range_holds(vector: Tensor) -> None:
    index = pq_index(vector)
    assert pq_index(7 * vector) == pytest.approx(index, abs=1e-9)
    assert pq_index(vector.repeat(3)) == pytest.approx(index, abs=1e-9)
    assert 0 <= index <= 1 - 1 / len(vector) + 1e-9


ORDERS = st.sampled_from([(0.5, 1.0), (0.3, 0.8), (1.0, 2.0)])


@given(VECTORS, st.floats(0.01, 1), ORDERS)
@settings(max_examples=50, deadline=None)
def test_taking_from_the_rich_lowers_it(vector: Tensor, share: float, orders: tuple[float, float]) -> None:
    """Robin Hood: from the largest to the smallest entry, at most half of what is between them."""
    rich, poor = int(vector.argmax()), int(vector.argmin())
    moved, amount = vector.clone(), share * (vector.max() - vector.min()) / 2
    moved[rich] -= amount
    moved[poor] += amount
    before, after = pq_index(vector, *orders), pq_index(moved, *orders)
    assert after < before if amount > 0.01 * vector.max() else after <= before + 1e-9


@given(VECTORS, st.floats(0.01, 100), ORDERS)
@settings(max_examples=50, deadline=None)
def test_a_rising_tide_lowers_it(vector: Tensor, tide: float, orders: tuple[float, float]) -> None:
    before, after = pq_index(vector, *orders), pq_index(vector + tide, *orders)
    uneven = vector.max() > 1.1 * vector.min() and tide > 0.01 * vector.max()
    assert after < before if uneven else after <= before + 1e-9


@given(VECTORS)
@settings(max_examples=50, deadline=None)
def test_what_is_retained_is_never_more_than_needed(vector: Tensor) -> None:
    """The theorem: with eta the share of the small in the large, r entries bound it from above, for every r."""
    p, q, index = 0.5, 1.0, pq_index(vector)
    powers = vector.pow(p).sort(descending=True).values
    for r in range(1, len(vector) + 1):
        eta = float(powers[r:].sum() / powers[:r].sum())
        assert r >= retained(index, len(vector), p, q) * (1 + eta) ** (-q / (q - p)) - 1e-6


def test_known_distributions_have_known_indices() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, generator=generator)
    uniform = torch.rand(200_000, generator=generator)
    laplace = torch.distributions.Exponential(1.0).icdf(torch.rand(200_000, generator=generator))  # its absolute value
    assert pq_index(laplace) == pytest.approx(1 - math.pi / 4, abs=2e-3)
    assert pq_index(normal) == pytest.approx(0.15279, abs=2e-3)
    assert pq_index(uniform) == pytest.approx(1 / 9, abs=2e-3)
    assert pq_index(torch.eye(50)[0]) == pytest.approx(1 - 1 / 50)


def test_one_marks_where_the_axis_would_be_cut() -> None:
    model = two_layers()
    norms, scores = scored("l2", model), scored("pq", model)
    kept = retained(pq_index(norms), 7)
    assert torch.equal(norms.argsort(), scores.argsort())
    assert int((scores < 1 - 1e-12).sum()) in (math.floor(7 - kept), math.ceil(7 - kept))


def test_orders_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 < p < q"):
        scored("pq", two_layers(), p=2.0)
