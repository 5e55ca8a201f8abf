"""Fisher information of gates."""

import pytest
import torch
import torch.nn.functional as F

from metaprune.errors import ConfigError
from tests.criteria.nets import LABELS, X, hidden, scored, two_layers


def test_by_single_samples_it_is_half_the_mean_square_of_gate_gradients() -> None:
    model = two_layers()
    x, expected = hidden(model).float(), torch.zeros(7, dtype=torch.float64)
    for row, label in zip(x, LABELS):
        gate = torch.ones(7, requires_grad=True)
        loss = F.cross_entropy(model[2](row * gate)[None], label[None])
        expected += torch.autograd.grad(loss, gate)[0].double().square() / (2 * len(X))
    torch.testing.assert_close(scored("fisher", model, group=1), expected, rtol=1e-5, atol=1e-10)


def test_a_last_group_of_fewer_samples_counts_for_as_many() -> None:
    """Batches of 10, 10 and 4 in groups of 4: four and four and two."""
    model = two_layers()
    x, expected = hidden(model).float(), torch.zeros(7, dtype=torch.float64)
    for rows in torch.arange(24).split([4, 4, 2, 4, 4, 2, 4]):
        gate = torch.ones(7, requires_grad=True)
        loss = F.cross_entropy(model[2](x[rows] * gate), LABELS[rows])
        expected += len(rows) ** 2 / 2 * torch.autograd.grad(loss, gate)[0].double().square() / 24
    torch.testing.assert_close(scored("fisher", model, group=4), expected, rtol=1e-5, atol=1e-10)


def test_only_so_many_samples_are_seen() -> None:
    model = two_layers()
    assert not torch.allclose(scored("fisher", model, samples=12), scored("fisher", model))
    torch.testing.assert_close(scored("fisher", model, samples=24), scored("fisher", model))


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="must hold"):
        scored("fisher", two_layers(), group=0)
