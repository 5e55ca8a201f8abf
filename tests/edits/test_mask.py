"""Mask: exactly as many entries leave as were asked for, along the right dimension."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from metaprune import zoo
from metaprune.edits import Keep, Mask, SetWeight, n_of_m, parse_pattern, unstructured
from metaprune.errors import ConfigError
from metaprune.graph import Network, trace
from metaprune.plans import Plan


@pytest.fixture(scope="module")
def net() -> Network:
    torch.manual_seed(0)
    return trace(zoo.build("digits_cnn", widths=(8, 16)).eval(), zoo.example_inputs("digits_cnn"))


def weight(net: Network, name: str) -> Tensor:
    return net.model.get_parameter(name).detach()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 3), st.integers(0, 99))
def test_exactly_that_many_leave_and_they_are_the_lowest(sizes, share, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {str(k): torch.randint(levels + 1, (n,), generator=generator).float() for k, n in enumerate(sizes)}
    kept = unstructured(scores, share)
    every, stays = torch.cat(list(scores.values())), torch.cat(list(kept.values()))
    assert int((~stays).sum()) == int(share * len(every))
    ranked = sorted(range(len(every)), key=lambda k: (float(every[k]), k))  # ties by index
    assert sorted((~stays).nonzero().flatten().tolist()) == sorted(ranked[: int(share * len(every))])


@given(st.integers(1, 4), st.integers(0, 3), st.integers(1, 5), st.integers(0, 2), st.integers(0, 99))
def test_exactly_n_of_every_m_stay_along_the_dimension(m, fewer, groups, into, seed):
    n = max(1, m - fewer)
    shape = [3, 2, 4]
    shape[into] = m * groups
    score = torch.randint(3, shape, generator=torch.Generator().manual_seed(seed)).float()
    kept = n_of_m(score, f"{n}:{m}", into).movedim(into, -1).unflatten(-1, (groups, m))
    assert bool((kept.sum(-1) == n).all())
    worth = score.movedim(into, -1).unflatten(-1, (groups, m))
    best = worth.sort(dim=-1, descending=True).values[..., :n].sum(-1)
    assert torch.equal((worth * kept).sum(-1), best)


def test_nothing_leaves_at_zero_and_all_at_one():
    scores = {"w": torch.zeros(3, 4)}
    assert unstructured(scores, 0)["w"].all()
    assert not unstructured(scores, 1)["w"].any()
    assert n_of_m(scores["w"], "4:4", 1).all()


def test_masked_entries_are_zero_and_the_others_bit_for_bit(net):
    kept = unstructured({"conv2.weight": weight(net, "conv2.weight").abs()}, 0.7)["conv2.weight"]
    plan = Plan((Mask("conv2.weight", kept),), net.fingerprint)
    slim = net.apply(plan)
    assert torch.equal(slim.get_parameter("conv2.weight"), weight(net, "conv2.weight") * kept)
    assert net.verify(plan, slim=slim).passed()


def test_masks_go_with_other_edits(net):
    """The mask counts whatever values the weight gets, and is cut with its axis."""
    name = "conv2.weight"
    axis = next(axis for axis in net.axes if axis.prunable and (name, 0) in axis.bindings)
    kept, value = torch.rand(weight(net, name).shape) > 0.5, torch.randn(weight(net, name).shape)
    plan = Plan((Mask(name, kept), SetWeight(name, value), Keep(axis.name, axis.size, (1, 3, 4))))
    slim = net.apply(plan)
    assert torch.equal(slim.get_parameter(name), (value * kept)[[1, 3, 4]])
    assert torch.equal(net.masks(plan)[name], kept[[1, 3, 4]])
    assert net.verify(plan, slim=slim).passed()


def test_a_second_mask_narrows_the_first(net):
    one, two = (torch.rand(weight(net, "conv2.weight").shape) > 0.3 for _ in range(2))
    plan = Plan((Mask("conv2.weight", one), Mask("conv2.weight", two)))
    assert torch.equal(net.masks(plan)["conv2.weight"], one & two)


class Products(nn.Module):
    """A linear layer, and one whose input is the first dimension of its weight, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.weight, self.bias = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, self.first(x).relu(), self.weight)


def test_the_pattern_runs_along_what_is_added_up():
    net = trace(Products(), torch.randn(3, 8))
    assert net.input_dim("first.weight") == 1
    assert net.input_dim("weight") == 0
    score = weight(net, "weight").abs()
    assert Mask("weight", n_of_m(score, "2:4", 0), "2:4").check(net) is None
    with pytest.raises(ConfigError, match=r"4 divides, but it is 6"):
        n_of_m(score, "2:4", 1)
    along_the_output = n_of_m(torch.randn(8, 8), "2:4", 0)[:, :8].repeat(2, 1)[:12]
    refusal = Mask("first.weight", along_the_output, "2:4").check(net)
    assert "2:4 must hold along the input of 'first.weight' (dimension 1)" in refusal


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (Mask("nowhere", torch.ones(3) > 0), "no parameter or buffer 'nowhere'"),
        (Mask("conv2.weight", torch.ones(3) > 0), "has shape (16, 8, 3, 3), but its mask has (3,)"),
        (Mask("conv1.weight", torch.ones(8, 1, 3, 3) > 0, "2:4"), "(dimension 1) that 4 divides, but it is 1"),
        (Mask("conv2.weight", torch.ones(16, 8, 3, 3) > 0, "2:4"), "keep another number than 2"),
        (Mask("bn1.bias", torch.ones(8) > 0, "2:4"), "none is known"),
    ],
)
def test_refusals(edit, reason, net):
    assert reason in edit.check(net)


def test_a_cut_that_breaks_the_pattern_is_refused(net):
    name = "conv2.weight"
    axis = next(axis for axis in net.axes if axis.prunable and (name, 1) in axis.bindings)
    kept = n_of_m(weight(net, name).abs(), "2:4", 1)
    whole = Plan((Mask(name, kept, "2:4"),))
    assert net.verify(whole).passed()
    half = Plan((*whole.edits, Keep(axis.name, axis.size, (0, 1, 2, 3))))  # whole groups: the pattern holds
    assert net.verify(half).passed()
    with pytest.raises(ConfigError, match=r"once other edits have cut it\. Cut first, then mask"):
        net.apply(Plan((*whole.edits, Keep(axis.name, axis.size, (0, 2, 3)))))


@pytest.mark.parametrize("pattern", ["", "2", "0:4", "5:4", "a:b", "2:4:8", "-1:4"])
def test_what_is_no_pattern(pattern):
    with pytest.raises(ConfigError, match="N:M"):
        parse_pattern(pattern)


def test_bad_scores():
    with pytest.raises(ConfigError, match="finite"):
        unstructured({"w": torch.tensor([float("nan")])}, 0.5)
    with pytest.raises(ConfigError, match="share"):
        unstructured({"w": torch.ones(2)}, 1.5)
    with pytest.raises(ConfigError, match=r"torch.float32"):
        Mask("w", torch.ones(2))


def test_plans_keep_it(net, tmp_path):
    plan = Plan((Mask("conv2.weight", n_of_m(weight(net, "conv2.weight"), "2:4", 1), "2:4"),))
    assert Plan.load(plan.save(tmp_path / "plan.json")) == plan
