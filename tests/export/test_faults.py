"""Faults put into good files: all are caught, their node is named, and nothing is said against good files."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from torch import Tensor, nn

from metaprune.export.culprit import Culprit, first_difference
from metaprune.export.example import Example, as_example
from metaprune.export.numeric import Judge, Truth
from metaprune.export.session import open_session
from metaprune.export.to_onnx import draft, export, ladder, save
from metaprune.export.validate import validate
from tests.export.conftest import BUILDERS, SHAPES


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.linear = nn.GRU(8, 12, 2, batch_first=True), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.gru(x)[0].mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(20, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 10)
    )


NETS = {**BUILDERS, "gru": Gated, "mlp": mlp}
INPUTS = {**SHAPES, "gru": (7, 8), "mlp": (20,)}


def trained(kind: str, seed: int) -> nn.Module:
    """A network all of whose parameters and statistics are drawn, as those of a trained one are."""
    torch.manual_seed(seed)
    net = NETS[kind]()
    with torch.no_grad():
        net(torch.randn(64, *INPUTS[kind]) + 0.3)
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return net.eval()


@dataclass
class Bench:
    """A network, its file, and all that is needed to judge changed files without exporting again."""

    kind: str
    folder: Path
    example: Example = field(init=False)

    def __post_init__(self) -> None:
        self.net, self.judge = trained(self.kind, 0), None
        self.judge = Judge(self.net)
        self.example = as_example(torch.randn(64, *INPUTS[self.kind]))
        self.truth: Truth = self.judge.truth(self.example)
        fresh = draft(self.net, self.example.head(2), ladder(self.example)[0], 20)
        save(fresh, self.folder / "fresh.onnx")
        self.fresh = onnx.load(self.folder / "fresh.onnx")

    def caught(self, model: ModelProto) -> bool:
        onnx.save(model, self.folder / "faulty.onnx")
        session = open_session(self.folder / "faulty.onnx", threads=1)
        return not self.truth.deviation(session.run(session.feeds(self.example))).passed

    def named(self, model: ModelProto) -> Culprit | None:
        feeds = {self.fresh.graph.input[0].name: self.example.head(4).args[0].numpy()}
        return first_difference(model, self.fresh, feeds)


def shifted(weight: np.ndarray) -> np.ndarray:
    return weight + 1e-3 * weight.std() * np.sign(np.random.default_rng(0).standard_normal(weight.shape))


def swapped(weight: np.ndarray) -> np.ndarray:
    axis = int(np.argmax(np.array(weight.shape) > 1))
    return np.take(weight, [1, 0, *range(2, weight.shape[axis])], axis)


def faults(fresh: ModelProto) -> list[tuple[str, ModelProto]]:
    """Every kind of fault that the file can have, each with the name of the node that then is wrong."""
    found: list[tuple[str, ModelProto]] = []

    def changed(node: str, change: Callable[[ModelProto], None]) -> None:
        model = ModelProto()
        model.CopyFrom(fresh)
        change(model)
        found.append((node, model))

    for index, tensor in enumerate(fresh.graph.initializer):
        weight = numpy_helper.to_array(tensor)
        readers = [node.name for node in fresh.graph.node if tensor.name in node.input]
        if weight.dtype != np.float32 or weight.size < 4 or not readers:
            continue
        for fault in (shifted, swapped):
            new = numpy_helper.from_array(fault(weight).astype(np.float32), tensor.name)
            changed(readers[0], lambda model, index=index, new=new: model.graph.initializer[index].CopyFrom(new))
    for index, node in enumerate(fresh.graph.node):
        wrong = {"epsilon": 1e-3, "linear_before_reset": 0}
        for name, value in wrong.items():
            if any(attribute.name == name for attribute in node.attribute):

                def change(model: ModelProto, index: int = index, name: str = name, value: float = value) -> None:
                    (own,) = (one for one in model.graph.node[index].attribute if one.name == name)
                    own.CopyFrom(helper.make_attribute(name, value))

                changed(node.name, change)
    return found


@pytest.mark.parametrize("kind", NETS)
def test_every_fault_is_caught_and_its_node_named(kind: str, tmp_path: Path) -> None:
    bench = Bench(kind, tmp_path)
    assert not bench.caught(bench.fresh)
    assert bench.named(bench.fresh) is None
    injected = faults(bench.fresh)
    assert len(injected) >= 8
    missed = [node for node, model in injected if not bench.caught(model)]
    assert missed == []
    wrong = [(node, str(got)) for node, model in injected if (got := bench.named(model)) is None or got.node != node]
    assert len(wrong) <= 0.05 * len(injected), wrong


def test_validation_names_the_node_its_module_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    net, x = trained("gru", 0), torch.randn(16, 7, 8)
    export(net, x, tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    (flag, *_) = (a for node in model.graph.node for a in node.attribute if a.name == "linear_before_reset")
    flag.i = 0
    onnx.save(model, tmp_path / "wrong.onnx")
    found = validate(tmp_path / "wrong.onnx", net, x, reference_limit_s=0)
    assert found.culprit is not None
    assert (found.culprit.operator, found.culprit.module) == ("GRU", "gru")
    assert found.culprit.reason == "its linear_before_reset is 0, and should be 1"
    assert "linear_before_reset" in str(found.to_json()["culprit"])
    with pytest.raises(Exception, match="Look at node"):
        found.require()


def test_a_step_that_the_network_lacks_is_named(tmp_path: Path) -> None:
    bench = Bench("mlp", tmp_path)
    model = ModelProto()
    model.CopyFrom(bench.fresh)
    last = model.graph.node[-1]
    extra = helper.make_node("Relu", [last.input[0]], ["extra"], name="added")
    last.input[0] = "extra"
    model.graph.node.insert(len(model.graph.node) - 1, extra)
    assert bench.caught(model)
    assert str(bench.named(model)) == "node 'added' (Relu): the network has no such step here"


class Lying(nn.Module):
    """Another layer under export: what a bug of the exporter looks like from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 1.001 if torch.compiler.is_exporting() else y


def test_where_the_exporter_is_wrong_the_module_is_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Lying(), nn.Linear(6, 4)).eval(), torch.randn(8, 6)
    fresh = draft(net, as_example(x), ladder(as_example(x))[0], 20)
    save(fresh, tmp_path / "net.onnx")
    found = validate(tmp_path / "net.onnx", net, x, reference_limit_s=0)
    assert found.culprit is not None
    assert found.culprit.module == "2"
    assert "the exporter is wrong" in found.culprit.reason


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 5))])
@pytest.mark.parametrize("kind", NETS)
def test_nothing_is_said_against_good_files(kind: str, seed: int, tmp_path: Path) -> None:
    net, x = trained(kind, seed), torch.randn(64, *INPUTS[kind])
    export(net, x[:2], tmp_path / "net.onnx")
    found = validate(tmp_path / "net.onnx", net, x)
    assert found.passed, found.to_json()
    assert found.culprit is None
