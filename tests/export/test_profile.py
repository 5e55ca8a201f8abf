"""Kernels are attributed to modules, whatever the runtime has made of the nodes of the file."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaprune.export.example import as_example
from metaprune.export.to_onnx import DEFAULT_OPSET, draft, ladder, save
from metaprune.measure import profile, shares_by_module
from metaprune.measure.profile import module_of


class Block(nn.Module):
    """A residual block whose activations have no module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (x + self.bn2(self.conv2(y))).relu()


class Tied(nn.Module):
    """Two layers that read one weight, and a product outside of the module that holds its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.two(self.one(x).relu()).relu(), self.three.weight, self.three.bias)


def written(net: nn.Module, inputs: Tensor, path: Path) -> Path:
    example = as_example(inputs)
    save(draft(net.eval(), example, ladder(example)[0], DEFAULT_OPSET), path)
    return path


def test_a_convolution_keeps_its_module_when_it_is_merged_and_runs_on_blocks(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), Block(16), nn.Conv2d(16, 13, 1), Block(13))
    nodes = profile(written(net, torch.randn(1, 3, 24, 24), tmp_path / "net.onnx"), rounds=5)
    wanted = ["0", "2.conv1", "2.conv2", "3", "4.conv1", "4.conv2"]
    assert [node.module for node in nodes if "Conv" in node.operator] == wanted
    shares = shares_by_module(nodes)
    assert sum(shares.values()) == pytest.approx(1)
    assert sum(shares[path] for path in wanted) > 0.5
    assert {path for path in shares if path.startswith("(other)")} <= {"(other).ReorderInput", "(other).ReorderOutput"}
    assert all((node.module is None) == node.operator.startswith("Reorder") for node in nodes)


def test_a_transformer_is_told_by_module_and_what_is_not_known_is_other(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(128, 4, 256, activation="gelu", batch_first=True, norm_first=True)
    with torch.no_grad():  # equal tensors would be stored once
        for parameter in layer.parameters():
            parameter.normal_()
    net = nn.Sequential(nn.Linear(8, 128), layer, nn.LayerNorm(128))
    nodes = profile(written(net, torch.randn(1, 64, 8), tmp_path / "net.onnx"), rounds=5)
    shares = shares_by_module(nodes)
    assert sum(shares.values()) == pytest.approx(1)
    assert {"0", "1.self_attn", "1.linear1", "1.linear2", "1.norm1"} <= set(shares)
    products = [node.module for node in nodes if node.operator in ("MatMul", "FusedMatMul", "Gemm")]
    assert None not in products
    unknown = {node.operator for node in nodes if node.module is None}
    assert {path for path in shares if path.startswith("(other)")} == {f"(other).{operator}" for operator in unknown}
    assert sum(share for path, share in shares.items() if path.startswith("(other)")) < 0.3


def test_a_node_is_named_after_the_module_whose_weights_it_alone_reads(tmp_path: Path) -> None:
    nodes = onnx.load(written(Tied(), torch.randn(2, 8), tmp_path / "net.onnx")).graph.node
    assert [module_of(node.name) for node in nodes if node.op_type == "Gemm"] == ["one", "two", "three"]
    assert [module_of(node.name) for node in nodes if node.op_type == "Relu"] == ["", ""]
