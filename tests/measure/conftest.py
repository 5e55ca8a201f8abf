"""Small ONNX files of clearly different cost, written node by node: this room knows no exporter."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


def convolutions(path: Path, channels: int, *, side: int | str = 24) -> Path:
    rng = np.random.default_rng(0)
    sizes = [3, channels, channels, channels]
    nodes, weights, value = [], [], "x"
    for index, (before, after) in enumerate(itertools.pairwise(sizes)):
        kernel = rng.standard_normal((after, before, 3, 3)).astype(np.float32) / before
        weights.append(numpy_helper.from_array(kernel, f"w{index}"))
        nodes.append(helper.make_node("Conv", [value, f"w{index}"], [f"h{index}"], pads=[1, 1, 1, 1]))
        value = f"h{index}"
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["y"]))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", channels, 1, 1])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture(scope="session")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convolutions(tmp_path_factory.mktemp("files") / "big.onnx", 64)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convolutions(tmp_path_factory.mktemp("files") / "small.onnx", 8)


@pytest.fixture(scope="session")
def any_side(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convolutions(tmp_path_factory.mktemp("files") / "any_side.onnx", 8, side="side")
