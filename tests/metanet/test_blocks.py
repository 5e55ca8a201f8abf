"""What a metanetwork reads: everything that is floating point, and written back to its place."""

import pytest
import torch

from metaprune.graph import trace
from metaprune.metanet import read_blocks, written
from metaprune.metanet.blocks import FREQUENCIES, kernel_code
from metaprune.zoo import MODELS, build, example_inputs


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dense", [False, True])
def test_what_is_read_and_written_back_is_the_network(name, dense):
    model = build(name)
    net = trace(model, example_inputs(name))
    graph = net.to_graph(dense)
    blocks = read_blocks(graph)
    state = model.state_dict()
    read = {name for name, place in net.places.places.items() if place.kind != "rest"}
    assert set(blocks.tensors) == {name for name in read if net.weights[name].is_floating_point()}
    doubled = net.from_graph(written(graph, {name: 2 * value for name, value in blocks.tensors.items()}))
    for name, tensor in state.items():
        assert torch.equal(doubled[name], 2 * tensor if name in blocks.tensors else tensor)
    same = net.from_graph(graph)  # the graph that was given stays
    assert all(torch.equal(same[name], tensor) for name, tensor in state.items())


def test_tiles_cover_a_block():
    net = trace(build("cifar_resnet20"), example_inputs("cifar_resnet20"))
    block = max(read_blocks(net.to_graph()).edges, key=lambda block: block.value_SOIK.numel())
    tiles = block.tiles(bytes_per_edge=4, tile_bytes=4 * block.value_SOIK.shape[2] * 3)
    assert len(tiles) > 3
    assert torch.equal(torch.cat([tile.value_SOIK for tile in tiles], dim=1), block.value_SOIK)
    assert torch.equal(torch.cat([tile.out_SO for tile in tiles], dim=1), block.out_SO)
    assert block.tiles(4, 1 << 30) == [block]


@pytest.mark.parametrize("sizes", [(), (1, 1), (3,), (3, 3), (5, 5), (7, 7), (16, 16), (4,), (2, 3, 3)])
def test_kernel_positions_are_coded_by_orthonormal_frequencies(sizes):
    code = kernel_code(sizes)
    count = int(torch.tensor(sizes).prod()) if sizes else 1
    assert code.shape == (count, FREQUENCIES)
    gram = code.T @ code
    used = gram.diagonal() > 0.5
    torch.testing.assert_close(gram, torch.diag(used.float()), atol=1e-5, rtol=0)
    assert int(used.sum()) == min(count, FREQUENCIES) or len(sizes) == 2
