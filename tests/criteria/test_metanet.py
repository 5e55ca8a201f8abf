"""How far the criterion goes along with a metanetwork."""

from dataclasses import replace

import pytest
import torch

from metaprune import zoo
from metaprune.criteria import metanet_scores
from metaprune.criteria.metanet import _beside_others, savings, threshold
from metaprune.errors import ConfigError
from metaprune.graph import trace
from metaprune.metanet import Metanet, Shape, read_blocks


def test_a_trusted_half_is_half_way_from_the_base_and_only_with_the_first_base() -> None:
    torch.manual_seed(0)
    network = trace(zoo.build("digits_cnn"), zoo.example_inputs("digits_cnn"))
    blocks = read_blocks(network.to_graph())
    metanet = Metanet(Shape(hidden=16, layers=1, heads=2, reads=("taylor", "l2")))
    torch.nn.init.normal_(metanet.worth[-1].weight)
    reads = {name: torch.rand(sum(axis.size for axis in network.axes)).double() + 0.1 for name in ("taylor", "l2")}

    def logs(trust: float, *names: str) -> torch.Tensor:
        metanet.shape = replace(metanet.shape, trust=trust)
        scores = metanet_scores(metanet, network, blocks, {name: reads[name] for name in names}, 0.5)
        log_U = torch.cat([part.log() for part in scores.values()])
        return log_U - log_U.mean()

    none, half, full = (logs(trust, "taylor", "l2") for trust in (0.0, 0.5, 1.0))
    assert not torch.allclose(none, full, atol=0.1)
    assert torch.allclose(half, (none + full) / 2, atol=1e-5)
    assert torch.equal(logs(0.0, "l2"), logs(1.0, "l2"))  # a weaker base is corrected in full


def test_trust_is_a_share() -> None:
    with pytest.raises(ConfigError, match="`0 <= trust <= 1` must hold, but trust=2"):
        Shape(trust=2.0)


def test_units_count_for_what_they_add_beside_the_others_that_leave() -> None:
    """Against the slope of the sum with interactions, where what leaves hangs on it in turn."""
    network = trace(zoo.build("digits_cnn").eval(), zoo.example_inputs("digits_cnn"))
    blocks = read_blocks(network.to_graph())
    axes = len(blocks.size_A)
    torch.manual_seed(0)
    score_U = torch.randn(len(blocks.axis_U), dtype=torch.float64)
    assert bool((_beside_others(network, blocks, score_U, torch.zeros(axes, axes).double(), 0.5) == 0).all())
    vector_AR = 0.3 * torch.randn(axes, 2, dtype=torch.float64)
    rho_AA = (vector_AR @ vector_AR.T).fill_diagonal_(0)
    found_A = _beside_others(network, blocks, score_U, rho_AA, 0.5)
    rate_U = score_U + found_A[blocks.axis_U] - savings(network).double()[blocks.axis_U].log()
    gone_U = blocks.prunable_A[blocks.axis_U] & (rate_U < threshold(network, blocks, rate_U, 0.5))
    worth_A = torch.zeros(axes).double().index_add(0, blocks.axis_U, torch.where(gone_U, score_U.exp(), 0))
    worth_A.requires_grad_(True)
    total = worth_A.sum() + (rho_AA * (worth_A[:, None] * worth_A).clamp_min(1e-30).sqrt()).sum()
    (slope_A,) = torch.autograd.grad(total, worth_A)
    losing = worth_A.detach() > 0
    assert int(losing.sum()) > 2
    torch.testing.assert_close(found_A[losing].exp(), slope_A[losing], rtol=0.15, atol=0.0)


def test_interactions_change_what_a_metanetwork_says() -> None:
    network = trace(zoo.build("digits_cnn").eval(), zoo.example_inputs("digits_cnn"))
    blocks, metanet = (
        read_blocks(network.to_graph()),
        Metanet(Shape(hidden=8, layers=1, heads=2, rank=2, pairs=2)).eval(),
    )
    before = metanet_scores(metanet, network, blocks, {}, 0.5)
    torch.nn.init.normal_(metanet.pairs.vector.weight, std=2.0)
    after = metanet_scores(metanet, network, blocks, {}, 0.5)
    factors = {name: after[name] / before[name] for name in after}
    assert all(torch.allclose(factor, factor[:1].expand_as(factor)) for factor in factors.values())  # by axis
    assert len({round(float(factor[0]), 4) for factor in factors.values()}) > 1
