"""The default metanetwork: equivariant, an identity at first, and the same whatever the tiles."""

import copy
from dataclasses import replace

import pytest
import torch

from metaprune.errors import ConfigError, ResourceError
from metaprune.graph import trace
from metaprune.metanet import Metanet, PaperMetanet, PaperShape, Shape, model, read_blocks, with_less_memory, written
from metaprune.zoo import MODELS, build, example_inputs
from tests.graph import oracle
from tests.graph.cases import CASES, Case
from tests.graph.random_networks import draw_program
from tests.graph.test_random_networks import Rolled

SHAPE = Shape(hidden=16, layers=2, heads=4, rank=3)


def awake(metanet):
    """A metanetwork that no longer starts from zero changes."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in metanet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return metanet.double()


def outputs(net, metanet, reads=None):
    """Edited parameters by name in their own shape, and scores by axis."""
    blocks = read_blocks(net.to_graph()).to(dtype=torch.float64)
    with torch.no_grad():
        if isinstance(metanet, PaperMetanet):
            tensors, scores = metanet(blocks), torch.zeros(len(blocks.axis_U))
        else:
            state = metanet(blocks, reads, 0.4)
            tensors, scores = metanet.edit(blocks, state), metanet.scores(blocks, state, reads, 0.4)
    own = {name: net.places.places[name].write(tensor) for name, tensor in tensors.items()}
    return own, {axis.name: scores[blocks.axis_U == k] for k, axis in enumerate(net.axes)}


def check_equivariance(model, inputs, metanet):
    net = trace(model, inputs)
    tensors, scores = outputs(net, metanet)
    checked = 0
    for name, learnt in oracle.positions_of_units(net, model).items():
        axis = net.axis(name)
        order = torch.randperm(axis.size, generator=torch.Generator().manual_seed(axis.size)).tolist()
        other = trace(oracle.permuted(copy.deepcopy(model), learnt, order), inputs)
        seen, seen_scores = outputs(other, metanet)
        torch.testing.assert_close(seen_scores[name], scores[name][order], atol=1e-6, rtol=1e-5)
        edited = copy.deepcopy(model).double()
        with torch.no_grad():
            for key, tensor in oracle.named(edited).items():
                if key in tensors:
                    tensor.copy_(tensors[key])
        wanted = oracle.named(oracle.permuted(edited, learnt, order))
        for key, tensor in seen.items():
            torch.testing.assert_close(tensor, wanted[key].detach(), atol=1e-6, rtol=1e-5)
        checked += 1
    return checked


PAPER = PaperShape(hidden=8, layers=2, node_ratio=1.0, edge_ratio=1.0)
METANETS = {"default": lambda: Metanet(SHAPE), "paper": lambda: PaperMetanet(PAPER)}
HARD = [
    "concat_of_concat",
    "grouped",
    "grouped_transposed",
    "squeeze_excite",
    "shuffle_by_view",
    "depthwise_multiplier",
]


@pytest.mark.parametrize("kind", METANETS)
@pytest.mark.parametrize("name", [name for name in HARD if name in CASES])
def test_units_in_another_order_give_the_same_in_that_order(kind, name):
    model, inputs = oracle.build(CASES[name])
    assert check_equivariance(model, inputs, awake(METANETS[kind]()))


@pytest.mark.parametrize("kind", METANETS)
@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(6, 60))])
@pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:index_reduce")
def test_units_of_random_networks_in_another_order_give_the_same_in_that_order(kind, seed):
    program = draw_program(Rolled(seed))
    model, inputs = oracle.build(Case("random", program.build, program.example))
    try:
        check_equivariance(model, inputs, awake(METANETS[kind]()))
    except oracle.WrongNetwork:
        pytest.skip("its units cannot be told apart by values")


@pytest.mark.parametrize("name", list(MODELS))
def test_a_fresh_metanetwork_changes_nothing_and_scores_as_its_base(name):
    net = trace(build(name), example_inputs(name))
    blocks, metanet = read_blocks(net.to_graph()), Metanet(SHAPE)
    units = len(blocks.axis_U)
    base = torch.rand(units) + 0.1
    state = metanet(blocks, {"l2": base}, 0.5)
    tensors = metanet.edit(blocks, state)
    assert set(tensors) == {name for name in blocks.tensors if net.places.places[name].parameter}
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, blocks.tensors[key].float(), atol=0, rtol=0)
    scores = metanet.scores(blocks, state, {"l2": base}, 0.5)
    torch.testing.assert_close(scores, (base / base.mean()).log(), atol=1e-5, rtol=1e-5)
    state_dict = net.from_graph(written(net.to_graph(), tensors))
    assert all(torch.equal(state_dict[key], value) for key, value in net.model.state_dict().items())


def test_tiles_and_recomputation_change_nothing(monkeypatch):
    blocks = read_blocks(trace(build("cifar_resnet8"), example_inputs("cifar_resnet8")).to_graph())
    seen = []
    for tile_bytes, recompute_from in ((1 << 26, 1 << 62), (1 << 12, 0)):
        monkeypatch.setattr(model, "RECOMPUTE_FROM", recompute_from)
        torch.manual_seed(0)
        metanet = awake(Metanet(SHAPE, tile_bytes)).float()
        state = metanet(blocks, None, 0.5)
        tensors = metanet.edit(blocks, state)
        loss = metanet.scores(blocks, state).square().sum() + sum(tensor.square().sum() for tensor in tensors.values())
        loss.backward()
        seen.append([loss, *(parameter.grad for parameter in metanet.parameters())])
    for one, other in zip(*seen, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: 9 bytes")])
def test_smaller_tiles_are_tried_before_giving_up(error):
    metanet, seen = Metanet(SHAPE), []

    def work(fits):
        seen.append(metanet.tile_bytes)
        if metanet.tile_bytes > fits:
            raise error
        return "done"

    assert with_less_memory(metanet, lambda: work(8 << 20)) == "done"
    assert seen == [64 << 20, 16 << 20, 4 << 20]
    with pytest.raises(ResourceError, match="needs more memory than there is, even with tiles of 1024 KiB"):
        with_less_memory(metanet, lambda: work(0))
    with pytest.raises(RuntimeError, match="something else"):
        with_less_memory(metanet, lambda: (_ for _ in ()).throw(RuntimeError("something else")))


def test_distortions_are_sums_over_axes_and_their_interactions():
    blocks = read_blocks(trace(build("digits_cnn"), example_inputs("digits_cnn")).to_graph())
    torch.manual_seed(0)
    plain, paired = Metanet(SHAPE), Metanet(replace(SHAPE, pairs=2))
    state = plain(blocks)
    units, axes = len(blocks.axis_U), len(blocks.size_A)
    score = torch.randn(units)
    removed = torch.rand(7, units) < 0.4
    removed[0] = blocks.axis_U == 0  # an axis alone has no interactions
    expected = torch.stack([score.exp()[row].sum().log() for row in removed])
    torch.testing.assert_close(plain.distortion(blocks, state, score, removed), expected)
    torch.testing.assert_close(paired.distortion(blocks, state, score, removed), expected, rtol=0.05, atol=0.05)
    torch.nn.init.normal_(paired.pairs.vector.weight, std=3.0)
    rho = paired.pairs(blocks, state)
    assert torch.equal(rho, rho.T)
    assert bool((rho.diagonal() == 0).all())
    assert float(rho.detach().min()) < -0.3
    worth = torch.stack(
        [torch.stack([score.exp()[row & (blocks.axis_U == a)].sum() for a in range(axes)]) for row in removed]
    )
    products = (worth.unsqueeze(1) * worth.unsqueeze(2)).sqrt()
    total = worth.sum(1) + (rho * products).sum((1, 2))
    seen = paired.distortion(blocks, state, score, removed)
    torch.testing.assert_close(seen, total.log(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen[0], expected[0], rtol=1e-4, atol=1e-4)
    seen.sum().backward()
    assert bool(paired.pairs.vector.weight.grad.isfinite().all())


def test_a_budget_and_the_criteria_read_matter():
    blocks = read_blocks(trace(build("mlp"), example_inputs("mlp")).to_graph())
    metanet = awake(Metanet(SHAPE)).float()
    reads = {"taylor": torch.rand(len(blocks.axis_U)) + 0.1}
    states = [metanet(blocks, reads, 0.5), metanet(blocks, reads, 0.3), metanet(blocks, None, 0.5)]
    assert not torch.allclose(states[0], states[1])
    assert not torch.allclose(states[0], states[2])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": 30}, "`hidden` a multiple of `heads`, but they are 30"),
        ({"edit": 0.0}, "`0 < edit <= 1` must hold"),
        ({"pairs": -1}, "`pairs >= 0` must hold"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Shape(**wrong)
