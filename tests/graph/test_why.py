"""What is coupled to what, in words: the moves of the trace read back."""

import json

import pytest
import torch
from torch import Tensor, nn

import metaprune as mp
from metaprune import zoo
from metaprune.errors import ConfigError
from metaprune.graph.why import Link


def traced(name: str) -> mp.Network:
    return mp.trace(zoo.build(name), zoo.example_inputs(name))


def every_binding_is_reached(net: mp.Network) -> None:
    """From any start, the links lead to all that leaves with the axis, each from something known before."""
    for axis in net.axes:
        names = {f"{name}:{k}" for name, k in axis.bindings}
        for asked in (axis.name, f"{axis.bindings[-1][0]}:{axis.bindings[-1][1]}"):
            (why,) = [one for one in net.why(asked) if one.axis.name == axis.name]
            known = {why.start}
            for link in why.links:
                assert link.known in known, (asked, link)
                assert link.ops, (asked, link)
                known.update(link.new)
            assert names <= known | {why.start}, (asked, names - known)


@pytest.mark.parametrize("name", ["cifar_resnet8", "vit_tiny", "llama_tiny", "cifar_shufflenet_v2", "lstm_classifier"])
def test_the_links_of_an_axis_reach_all_its_bindings(name: str) -> None:
    every_binding_is_reached(traced(name))


def test_a_residual_addition_is_named() -> None:
    net = traced("cifar_resnet8")
    (why,) = net.why("conv1")
    assert why.start == "conv1.weight:0"
    said = why.sentences()
    assert said[0] == "Axis conv1 may be cut; each of its 16 units leaves everywhere at once."
    assert "conv1.weight:0 and layer1.0.conv2.weight:0 share units because add at layer1.0 adds them." in said
    assert any(line.startswith("conv1.weight:0, bn1.{weight,bias,running_mean,running_var}:0 share") for line in said)
    (inside,) = net.why("layer1.0.conv2.weight:0")
    assert inside.start == "layer1.0.conv2.weight:0"
    assert Link("layer1.0.conv2.weight:0", ("conv1.weight:0",), ("add at layer1.0",)) in inside.links


def test_a_module_and_a_parameter_mean_all_their_axes() -> None:
    net = traced("cifar_resnet8")
    assert [why.axis.name for why in net.why("layer2.0.conv2.weight")] == ["conv1", "layer2.0.conv1", "layer2.0.conv2"]
    assert [why.axis.name for why in net.why("layer2.0.conv2.weight:1")] == ["layer2.0.conv1"]
    assert [why.axis.name for why in net.why("layer1.0.bn1")] == ["layer1.0.conv1"]
    assert [why.axis.name for why in net.why("layer1")] == ["conv1", "layer1.0.conv1"]
    assert [why.axis.name for why in net.why("linear.weight:1")] == ["conv1", "layer2.0.conv2", "layer3.0.conv2"]


def test_a_concatenation_keeps_its_parts_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(11, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    first, second = mp.trace(Two(), torch.randn(2, 4)).why("c.weight:1")
    assert (first.axis.name, second.axis.name) == ("a", "b")
    assert str(first.links[0]) == ("c.weight:1 and a.weight:0 share units because linear at c applies one to the other")
    assert all("b." not in name for link in first.links for name in link.new)


def test_a_fused_projection_is_a_grid_of_heads() -> None:
    whys = traced("vit_tiny").why("blocks.0.attention.qkv.weight:0")
    heads = next(why for why in whys if why.axis.name == "blocks.0.attention.qkv:head")
    said = heads.sentences()
    assert (
        "blocks.0.attention.qkv.weight:0 is a grid that holds units of axis blocks.0.attention.qkv:head, because of "
        "view at blocks.0.attention." in said
    )
    reached = {name for link in heads.links for name in link.new}
    assert reached == {f"blocks.0.attention.{name}" for name in ("qkv.weight:0", "qkv.bias:0", "out.weight:1")}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.middle, self.outside = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.outside.weight = self.inside.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.outside(self.middle(self.inside(x))))


def test_tied_weights_are_one_tensor() -> None:
    net = mp.trace(Tied(), torch.randn(2, 6))
    by_alias = net.why("outside.weight:0")
    assert [why.axis.name for why in by_alias] == [why.axis.name for why in net.why("inside.weight:0")]
    assert "outside.weight and inside.weight are one tensor." in by_alias[0].sentences()
    assert "head.weight:1" in {name for link in by_alias[0].links for name in link.new}


def test_what_must_stay_has_the_whole_way_to_the_reason() -> None:
    net = mp.trace(zoo.build("cifar_resnet8"), zoo.example_inputs("cifar_resnet8"), freeze="layer2.0.conv2")
    why = next(why for why in net.why("layer1.0.bn2.weight") if not why.axis.prunable)
    steps = [(link.known, *link.new, *link.ops) for link in why.chain]
    assert steps == [
        ("layer1.0.bn2.weight:0", "layer1.0.conv2.weight:0", "batch_norm at layer1.0.bn2"),
        ("layer1.0.conv2.weight:0", "conv1.weight:0", "add at layer1.0"),
        ("conv1.weight:0", "layer2.0.conv2.weight:0", "add at layer2.0"),
    ]
    assert why.end == "layer2.0.conv2.weight:0"
    assert "From layer1.0.bn2.weight:0 to the reason: " in why.sentences()[1]


def test_a_sum_over_what_is_not_zero_is_traced_back() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            left, right = self.a(x), self.b(x)
            return self.c(left + right), right.sigmoid().sum(1)

    (why,) = mp.trace(Summed(), torch.randn(2, 4)).why("c.weight:1")
    assert "summed over in sum at the top level" in why.axis.reason
    assert why.chain[0].known == "c.weight:1"
    assert why.end == "b.weight:0"


def test_plain_data_is_json() -> None:
    for why in traced("vit_tiny").why("blocks.0.attention"):
        data = json.loads(json.dumps(why.to_json()))
        assert data["words"] == why.sentences()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("layer1.0.convo1", "Did you mean 'layer1.0.conv1'"),
        ("layer1.0.conv1.wieght:0", "Did you mean 'layer1.0.conv1.weight"),
        ("conv1.weight:2", "Those of conv1.weight are conv1.weight:0, conv1.weight:1"),
        ("bn1.num_batches_tracked", "no dimension of units"),
        ("", "no axis, parameter or module is named ''"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        traced("cifar_resnet8").why(name)
