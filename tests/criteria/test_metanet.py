"""How far the criterion goes along with a metanetwork."""

from dataclasses import replace

import pytest
import torch

from metaprune import zoo
from metaprune.criteria import metanet_scores
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
