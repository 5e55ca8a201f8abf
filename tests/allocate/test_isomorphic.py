"""One threshold for axes of one role."""

import torch

from metaprune import zoo
from metaprune.allocate.isomorphic import role
from metaprune.graph import trace
from tests.allocate.problems import allocated


def test_insides_of_blocks_are_one_role_and_streams_another() -> None:
    net = trace(zoo.build("cifar_resnet14"), zoo.example_inputs("cifar_resnet14"))
    roles = {axis.name: role(net, axis) for axis in net.axes if axis.prunable}
    inside = {roles[name] for name in roles if name.endswith(".conv1")}
    streams = {roles[name] for name in roles if name.endswith("conv2") or name == "conv1"}
    assert len(inside) == len(streams) == 1
    assert inside != streams


def test_roles_lose_the_same_share_whatever_their_scale() -> None:
    net = trace(zoo.build("cifar_resnet14"), zoo.example_inputs("cifar_resnet14"))
    generator = torch.Generator().manual_seed(0)
    scores = {a.name: torch.rand(a.size, generator=generator).double() for a in net.axes if a.prunable}
    streams = {name for name in scores if not name.endswith(".conv1")}
    scores = {name: score_U * (1e-6 if name in streams else 1) for name, score_U in scores.items()}
    kept = allocated("isomorphic", net, scores, 0.5)
    share = [
        sum(kept[name] for name in names) / sum(net.axis(name).size for name in names)
        for names in (streams, scores.keys() - streams)
    ]
    assert abs(share[0] - share[1]) < 0.05
    assert len({kept[name] / net.axis(name).size for name in scores}) > 2  # inside of a role, scores decide
