"""A network as a graph and back: bit for bit, and with every weight between the right nodes."""

import copy
import json
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from metaprune.edits import Keep
from metaprune.errors import InputError, UnsupportedModelError
from metaprune.graph import load_graph, save_graph, tensors_of, trace
from metaprune.plans import Plan
from metaprune.zoo import MODELS, build, example_inputs
from tests.graph import oracle
from tests.graph.cases import CASES
from tests.graph.test_cases import pytestmark as pytestmark
from tests.graph.test_cases import traced

every_network = pytest.mark.parametrize("name", [*CASES, *(f"zoo:{name}" for name in MODELS)])


@cache
def _zoo(name):
    model = build(name)
    return model, trace(model, example_inputs(name))


def network(name):
    if name.startswith("zoo:"):
        return _zoo(name.removeprefix("zoo:"))
    _, model, _, net = traced(name)
    return model, net


def same(state, wanted):
    assert list(state) == [name for name in wanted if isinstance(wanted[name], torch.Tensor)]
    for name, tensor in state.items():
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name]), name


@every_network
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.filterwarnings("ignore:The node types .* are isolated")  # where no tensor is a feature
def test_the_way_back_gives_every_tensor_bit_for_bit(name, dense, tmp_path):
    model, net = network(name)
    graph = net.to_graph(dense)
    assert graph.validate()
    same(net.from_graph(graph), model.state_dict())
    same(net.from_graph(load_graph(save_graph(graph, tmp_path / "graph.safetensors"))), model.state_dict())
    moved = copy.deepcopy(graph).to("cpu", torch.device("cpu"))
    same(net.from_graph(moved), model.state_dict())


@every_network
def test_an_entry_leaves_with_the_nodes_that_it_lies_between(name):
    """The nodes of a weight say which of its entries a cut takes, as surgery finds out in another way."""
    model, net = network(name)
    plan = oracle.random_plan(net, 0)
    if not plan.edits:
        pytest.skip("nothing to cut")
    try:
        slim = oracle.named(net.apply(plan))
    except UnsupportedModelError:
        pytest.skip("refused, see test_cases.py")
    graph = net.to_graph()
    kept = {edit.axis: set(edit.kept) for edit in plan.edits if isinstance(edit, Keep)}
    stays = torch.ones(graph["unit"].num_nodes, dtype=torch.bool)
    for node, (axis, rank) in enumerate(zip(graph["unit"].axis.tolist(), graph["unit"].rank.tolist(), strict=True)):
        owner = net.axes[axis].name if axis >= 0 else ""
        stays[node] = owner not in kept or rank in kept[owner]
    for joint, unit in graph["unit", "needs", "unit"].edge_index.T.tolist():
        stays[joint] &= stays[unit]
    dense = oracle.named(model)
    for tensor in tensors_of(graph):
        place = net.places.places[tensor.name]
        mask = torch.ones(tensor.value.shape, dtype=torch.bool)
        if tensor.kind == "edge":
            groups, rows, columns = tensor.value.shape[:3]
            between = stays[tensor.out].view(groups, rows, 1) & stays[tensor.into].view(groups, 1, columns)
            mask &= between.reshape(groups, rows, columns, *[1] * (mask.ndim - 3))
        elif tensor.kind == "feature":
            mask &= stays[tensor.out].reshape(-1, *[1] * (mask.ndim - 1))
        if tensor.name in slim and tensor.value.is_floating_point():  # surgery renumbers what holds positions
            left = dense[tensor.name][place.write(mask)]
            assert torch.equal(left, slim[tensor.name].flatten()), (tensor.name, place)


def test_a_dense_graph_holds_the_parameters_themselves():
    model, net = _zoo("cifar_resnet20")
    for tensor in tensors_of(net.to_graph(dense=True)):
        if tensor.kind == "edge":
            assert tensor.value.data_ptr() == model.get_parameter(tensor.name).data_ptr()


def test_large_networks_are_dense_unless_asked_otherwise():
    net = _zoo("cifar_vgg11")[1]
    assert net.to_graph().dense
    assert not net.to_graph(dense=False).dense
    assert not _zoo("mlp")[1].to_graph().dense


def test_a_graph_can_be_edited():
    net = _zoo("mlp")[1]
    graph = net.to_graph(dense=False)
    name = next(iter(net.places.places))
    graph["unit", name, "unit"].edge_attr = graph["unit", name, "unit"].edge_attr + 1
    assert torch.equal(net.from_graph(graph)[name], net.model.get_parameter(name) + 1)


def test_units_and_axes_are_those_of_the_network():
    net = _zoo("vit_tiny")[1]
    graph = net.to_graph()
    assert graph["axis"].size.tolist() == [axis.size for axis in net.axes]
    assert torch.equal(torch.bincount(graph["unit", "of", "axis"].edge_index[1]), graph["axis"].size)
    feeds = {(net.axes[a].name, net.axes[b].name) for a, b in graph["axis", "feeds", "axis"].edge_index.T.tolist()}
    mlp = next(axis.name for axis in net.axes if axis.name.endswith("mlp.0"))
    stream = net.axes[0].name
    assert {(stream, mlp), (mlp, stream)} <= feeds
    assert (mlp, mlp) not in feeds


def test_a_graph_of_another_network_is_refused():
    with pytest.raises(InputError, match="must be of this network"):
        _zoo("mlp")[1].from_graph(_zoo("digits_cnn")[1].to_graph())


def test_a_graph_with_another_shape_or_without_a_tensor_is_refused():
    net = _zoo("mlp")[1]
    name = next(iter(net.places.places))
    graph = net.to_graph(dense=True)
    graph["unit", name, "unit"].block = torch.zeros(1, 2, 2)
    with pytest.raises(InputError, match=rf"'{name}' has \(1, 2, 2\)"):
        net.from_graph(graph)
    graph = net.to_graph()
    del graph["unit", name, "unit"]
    with pytest.raises(InputError, match=f"lacks '{name}'"):
        net.from_graph(graph)


def test_a_damaged_file_or_one_of_another_schema_is_refused(tmp_path):
    path = save_graph(_zoo("mlp")[1].to_graph(), tmp_path / "graph.safetensors")
    with pytest.raises(InputError, match="does not exist"):
        load_graph(tmp_path / "other.safetensors")
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="cannot be read"):
        load_graph(tmp_path / "short.safetensors")
    tensors = load_file(path)
    save_file(tensors, tmp_path / "old.safetensors", {"graph": json.dumps({"schema": 0, "stores": []})})
    with pytest.raises(InputError, match="has schema 0, but this version reads 1"):
        load_graph(tmp_path / "old.safetensors")
    save_file(tensors, tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        load_graph(tmp_path / "plain.safetensors")


def test_plans_and_graphs_agree_on_what_a_unit_is():
    """Removing one unit takes exactly the entries at its node."""
    net = _zoo("cifar_resnet8")[1]
    axis = next(axis for axis in net.axes if axis.prunable)
    slim = net.apply(Plan((Keep(axis.name, axis.size, tuple(range(1, axis.size))),), net.fingerprint))
    node = int(np.flatnonzero((net.places.axis_of == net.index(axis.name)) & (net.places.rank_of == 0))[0])
    gone = sum(
        int((tensor.out == node).sum() if tensor.kind == "feature" else 0) for tensor in tensors_of(net.to_graph())
    )
    before, after = (sum(t.numel() for t in oracle.named(m).values() if t.ndim == 1) for m in (net.model, slim))
    assert gone == before - after > 0
