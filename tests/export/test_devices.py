"""Profiles decide sizes and budgets, and say where their numbers come from."""

from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

import metaprune as mp
from metaprune import zoo
from metaprune.errors import BudgetError, ConfigError, InputError, MetapruneError
from metaprune.export.devices import (
    Device,
    Settings,
    device_names,
    fits,
    load_device,
    peak_activations,
    settings_for,
)
from metaprune.export.to_onnx import export
from metaprune.graph import Network
from metaprune.measure.quantity import Label
from metaprune.planning import reachable_limits


@pytest.mark.parametrize("name", device_names())
def test_a_shipped_profile_is_whole(name: str) -> None:
    device = load_device(name)
    assert device.name == name
    assert device.label in get_args(Label)
    assert device.alignment >= 4
    assert device.label == "measured" or device.source
    assert device.runtime or device.storage
    projected = device.projected_ms(1e6, 1e6)
    assert (projected is None) == (device.gflops is None)
    assert projected is None or projected.label == "projected"


def test_a_profile_of_the_user_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "drone.yaml").write_text("round_to: 12\nprecision: [int8]\nstorage: 96KiB\n")
    device = load_device(tmp_path / "drone.yaml")
    assert (device.name, device.alignment, device.storage, device.width) == ("drone", 12, 98304, 1)
    assert device.label == "projected"  # unless it says otherwise


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("label: guessed\n", "drone.yaml:1: `label` must be"),
        ("label: measured\nroundto: 8\n", "Did you mean 'round_to'"),
        ("label: measured\nround_to: 0\n", "drone.yaml:2: `round_to` must be at least 1"),
        ("label: measured\nprecision: [fp8]\n", "drone.yaml:2: `precision`"),
        ("label: measured\nmemory: lots\n", "drone.yaml:2: `memory` must be a number of bytes"),
    ],
)
def test_what_is_wrong_with_a_profile_is_said(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "drone.yaml").write_text(text)
    with pytest.raises(MetapruneError, match=said):
        load_device(tmp_path / "drone.yaml")


def test_an_unknown_device_names_its_neighbour() -> None:
    with pytest.raises(InputError, match="Did you mean 'rpi5'"):
        load_device("rpi55")


@pytest.fixture(scope="module")
def network() -> Network:
    return mp.trace(zoo.build("cifar_resnet20"), zoo.example_inputs("cifar_resnet20"))


def asked(network: Network, device: Device, budget: str = "", round_to: int | None = None) -> Settings:
    return settings_for(
        device, network, budget, round_to, reach=lambda text, size: reachable_limits(network, text, round_to=size)
    )


def test_alignment_is_that_of_the_device_or_the_largest_that_reaches_the_budget(network: Network) -> None:
    device = Device(label="measured", name="wide", round_to=16)
    assert asked(network, device, "macs=0.9").round_to == 16
    lower = asked(network, device, "macs=0.5")
    assert lower.round_to == 8
    (note,) = lower.notes
    assert note.startswith("Sizes in multiples of 16, as wide likes them, cannot reach macs=0.5. Residual branches")
    assert asked(network, device, "macs=0.5", round_to=2).round_to == 2
    with pytest.raises(BudgetError, match="multiples of 16"):
        asked(network, device, "macs=0.5", round_to=16)
    with pytest.raises(BudgetError):
        asked(network, device, "macs=0.001")


def test_limits_of_the_device_join_the_budget_where_the_network_exceeds_them(network: Network) -> None:
    small = Device(label="projected", name="chip", precision=("int8",), round_to=4, storage=100_000)
    found = asked(network, small)
    assert found.budget == "params=100000"
    assert "chip asks for params=100000" in found.notes[0]
    assert asked(network, small, "macs=0.3").budget == "macs=0.3,params=100000"
    with pytest.raises(ConfigError, match="fits roomy as it is"):
        asked(network, Device(label="projected", name="roomy", storage=10**9))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1, stride=2), nn.Flatten())
    return Path(export(net, torch.randn(2, 3, 8, 8), tmp_path / "net.onnx").path)


def test_activations_live_from_their_node_to_their_last_reader(file: Path) -> None:
    assert peak_activations(file) == 8 * 64 + 8 * 64  # into and out of the ReLU, or fused away
    assert peak_activations(file, {"batch": 3}) == 3 * peak_activations(file)


def test_a_file_is_held_against_the_limits_of_a_device(file: Path) -> None:
    chip = Device(label="projected", precision=("int8",), memory=1100, storage=400, runtime=False)
    weights, activations = fits(chip, file)
    assert (weights.what, weights.needs.value, weights.passed) == ("weights", 8 * 27 + 8 + 4 * 72 + 4, False)
    assert (activations.what, activations.needs.value, activations.passed) == ("activations", 1024, True)
    assert weights.needs.label == activations.needs.label == "projected"
    assert "weights take 516 of 400 bytes (projected)" in str(weights)
    assert fits(load_device("host"), file) == ()


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_liveness_equals_a_count_at_every_moment(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random graphs of sums: what is alive at a node is what it or a later one reads or gives."""
    count = data.draw(st.integers(1, 8))
    names, nodes = ["x"], []
    for k in range(count):
        one, two = (names[data.draw(st.integers(0, len(names) - 1))] for _ in range(2))
        nodes.append(helper.make_node("Concat", [one, two], [f"v{k}"], axis=1))
        names.append(f"v{k}")
    port = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None]) for name in ("x", names[-1])]
    port[0].type.tensor_type.shape.dim[1].dim_value = 1
    model = helper.make_model(
        helper.make_graph(nodes, "net", port[:1], port[1:]), opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    )
    path = tmp_path_factory.mktemp("random") / "net.onnx"
    onnx.save(model, path)
    sizes = {"x": 1}
    for node in nodes:
        sizes[node.output[0]] = sizes[node.input[0]] + sizes[node.input[1]]
    moments = []
    for now in range(count):
        born = {"x", *(node.output[0] for node in nodes[: now + 1])}
        wanted = {names[-1], nodes[now].output[0], *(name for node in nodes[now:] for name in node.input)}
        first = {"x"} if now == 0 else set()  # the input is there, whether it is read or not
        moments.append(sum(sizes[name] for name in born & (wanted | first)))
    assert peak_activations(path) == max(moments)
    assert np.isfinite(max(moments))
