"""The factored metanetwork against plain message passing, values and gradients."""

import pytest
import torch

from metaprune.errors import ConfigError
from metaprune.graph import trace
from metaprune.metanet import PaperMetanet, PaperShape, read_blocks
from metaprune.metanet.reference import ReferenceMetanet
from metaprune.zoo import MODELS, build, example_inputs

SMALL = ["cifar_resnet8", "cifar_resnet8_projection", "digits_cnn", "gru_classifier", "lstm_classifier", "mlp"]


def run(metanet, weights, blocks):
    for parameter in weights.parameters():
        parameter.grad = None
    tensors = metanet(blocks)
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (tensors[name] * torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)).sum()
        for name in sorted(tensors)
    )
    loss.backward()
    return tensors, {name: parameter.grad for name, parameter in weights.named_parameters()}


def close(seen, wanted):
    assert set(seen) == set(wanted)
    for name, tensor in wanted.items():
        assert (seen[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max().clamp_min(1e-6), name


def blocks_of(name):
    return read_blocks(trace(build(name), example_inputs(name)).to_graph())


@pytest.mark.parametrize(
    "name", [name if name in SMALL else pytest.param(name, marks=pytest.mark.long) for name in MODELS]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_values_and_gradients_are_those_of_plain_message_passing(name, recompute):
    blocks = blocks_of(name).to(dtype=torch.float64)
    shape = PaperShape(hidden=8, layers=3, node_ratio=1.0, edge_ratio=1.0)
    paper = PaperMetanet(shape, tile_bytes=1 << 16, recompute=recompute).double()
    tensors, gradients = run(paper, paper, blocks)
    wanted, wanted_gradients = run(ReferenceMetanet(paper), paper, blocks)
    close(tensors, wanted)
    close(gradients, wanted_gradients)


def test_only_what_is_learnt_is_edited_and_ratios_bound_it():
    blocks = blocks_of("cifar_resnet8")
    tensors = PaperMetanet(PaperShape(hidden=8, layers=2, node_ratio=0.0, edge_ratio=0.0))(blocks)
    assert not any("running" in name for name in tensors)
    assert all(torch.equal(tensor, blocks.tensors[name]) for name, tensor in tensors.items())


def test_an_odd_size_is_refused():
    with pytest.raises(ConfigError, match="`hidden` must be even and `layers` at least 1, but they are 7 and 2"):
        PaperMetanet(PaperShape(hidden=7, layers=2))
