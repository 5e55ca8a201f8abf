"""A network as a graph and back, without loss.

The graph is a :class:`torch_geometric.data.HeteroData`:

=====================================  =================================================================================
``unit``                               nodes, see :mod:`metaprune.graph.places`; ``axis``, ``rank``: -1 at joint ones
``axis``                               one node an axis: ``size``, ``kind`` (of :data:`KINDS`), ``prunable``, and
                                       ``share``: the part of each quantity of cost that has it as a factor
``parameter``                          one node a parameter or buffer: ``type`` (of :data:`TYPES`), ``depth``,
                                       ``learnt``
``(unit, NAME, unit)``                 a tensor with two unit dimensions: edges from the units read to those made
``(parameter, NAME, unit)``            a tensor with one: the typed features of its units
``(parameter, NAME, parameter)``       a tensor with none
``(unit, of, axis)``                   which axis a unit belongs to
``(unit, needs, unit)``                which units a joint node needs (coupling)
``(axis, feeds, axis)``                a weight reads one and makes the other (structure)
=====================================  =================================================================================

Every tensor is in one store, under its name: as ``edge_attr`` (entries, kernel positions) with ``edge_index``, or in a
*dense* graph, for two unit dimensions, as ``block`` [groups, out, in, *kernel], a view of the tensor itself, with the
nodes ``out`` and ``into``. :func:`tensors_of` reads both alike.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from metaprune.errors import InputError
from metaprune.files import make_folder, write_atomically
from metaprune.graph.places import Place, Places
from metaprune.graph.twin import named_tensors

if TYPE_CHECKING:
    from torch_geometric.data import HeteroData

    from metaprune.graph.network import Network

SCHEMA = 1
DENSE_FROM = 4 << 20  # entries; edges of a larger network would take more memory than they are worth
KINDS = ("channel", "group", "head", "head_dim", "hidden")
_NORMS = ("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm")
TYPES = (
    "",  # any other
    *(f"{op}.{what}" for op in ("conv1d", "conv2d", "conv3d", "linear") for what in ("weight", "bias")),
    *(f"conv_transpose{n}d.{what}" for n in (1, 2, 3) for what in ("weight", "bias")),
    *(f"{op}.{what}" for op in _NORMS for what in ("weight", "bias", "running_mean", "running_var")),
    *("embedding.weight", "lstm.params", "gru.params", "addmm.mat1", "addmm.mat2", "addmm.self", "matmul.other"),
    *("add.other", "mul.other", "prelu.weight", "cat.tensors"),
)


@dataclass(frozen=True, eq=False)
class GraphTensor:
    """One tensor of a graph in its form, whichever way it is stored.

    Attributes:
        name: Of the parameter or buffer.
        kind: ``edge``, ``feature`` or ``rest``.
        node: Its ``parameter`` node.
        value: [groups, out, in, *kernel], [nodes, *kernel] or [*kernel].
        out: Nodes made, (groups * out,), or those with the feature, (nodes,); empty for a rest.
        into: Nodes read, (groups * in,); empty unless it is an edge block.
    """

    name: str
    kind: str
    node: int
    value: Tensor
    out: Tensor
    into: Tensor


def to_graph(network: "Network", dense: bool | None = None) -> "HeteroData":
    """See :meth:`Network.to_graph`."""
    from torch_geometric.data import HeteroData

    places = network.places
    tensors = network.weights
    if dense is None:
        dense = sum(tensors[name].numel() for name in places.places) >= DENSE_FROM
    graph = HeteroData(schema=SCHEMA, network=network.fingerprint, dense=dense)
    joint = places.count - len(places.axis_of)
    padding = np.full(joint, -1)
    graph["unit"].num_nodes = places.count
    graph["unit"].axis = torch.from_numpy(np.concatenate([places.axis_of, padding]))
    graph["unit"].rank = torch.from_numpy(np.concatenate([places.rank_of, padding]))
    graph["axis"].num_nodes = len(network.axes)
    graph["axis"].size = torch.tensor([axis.size for axis in network.axes], dtype=torch.int64)
    graph["axis"].kind = torch.tensor([KINDS.index(axis.kind) for axis in network.axes], dtype=torch.int64)
    graph["axis"].prunable = torch.tensor([axis.prunable for axis in network.axes], dtype=torch.bool)
    graph["axis"].share = torch.tensor([list(share.values()) for share in network.shares().values()]).view(-1, 4)
    each = list(places.places.values())
    number = {kind: k for k, kind in enumerate(TYPES)}
    graph["parameter"].num_nodes = len(each)
    graph["parameter"].type = torch.tensor([number.get(place.type, 0) for place in each], dtype=torch.int64)
    graph["parameter"].depth = torch.tensor([place.depth for place in each], dtype=torch.float32)
    graph["parameter"].learnt = torch.tensor([place.parameter for place in each], dtype=torch.bool)
    units = torch.arange(len(places.axis_of))
    graph["unit", "of", "axis"].edge_index = torch.stack([units, torch.from_numpy(places.axis_of)])
    graph["unit", "needs", "unit"].edge_index = torch.from_numpy(places.needs)
    graph["axis", "feeds", "axis"].edge_index = torch.from_numpy(_feeds(places))
    for node, place in enumerate(each):
        _put(graph, node, place, place.read(tensors[place.name].detach()), dense)
    return graph


def from_graph(network: "Network", graph: "HeteroData") -> "OrderedDict[str, Tensor]":
    """See :meth:`Network.from_graph`."""
    check_graph(network, graph)
    aliases = network.aliases
    made: dict[str, Tensor] = {}
    for tensor in tensors_of(graph):
        place = network.places.places.get(tensor.name)
        if place is None or tuple(tensor.value.shape) != place.form:
            raise InputError(
                f"every tensor of the graph must be one of the network in its form, but {tensor.name!r} has "
                f"{tuple(tensor.value.shape)}{f' for {place.form}' if place else ' and the network has none'}."
            )
        made[tensor.name] = place.write(tensor.value).contiguous()
    lacking = [name for name in network.places.places if name not in made]
    if lacking:
        raise InputError(f"the graph must hold every tensor of the network, but lacks {lacking[0]!r}.")
    state = network.model.state_dict(keep_vars=True)
    tensors = named_tensors(network.model)
    return OrderedDict((name, made[aliases.get(name, name)]) for name in state if name in tensors)


def check_graph(network: "Network", graph: "HeteroData") -> None:
    """Refuse a graph that was made of another network.

    Raises:
        InputError: Its fingerprint is another.
    """
    made_of = getattr(graph, "network", None)
    if made_of != network.fingerprint:
        raise InputError(
            f"a graph must be of this network (fingerprint {network.fingerprint}), but this one is of {made_of!r}. "
            "Trace the model that it was made of, or make the graph again."
        )


def tensors_of(graph: "HeteroData") -> Iterator[GraphTensor]:
    """Every parameter and buffer of a graph, dense or not, in the order of the ``parameter`` nodes."""
    for source, name, target in graph.edge_types:
        store = graph[source, name, target]
        if (source, target) in (
            ("unit", "unit"),
            ("parameter", "unit"),
            ("parameter", "parameter"),
        ) and "node" in store:
            yield _take(name, source, target, store)


def save_graph(graph: "HeteroData", path: str | Path) -> Path:
    """Write a graph as one safetensors file, whose header holds all that is no tensor as JSON.

    Raises:
        InputError: The folder cannot be written.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    stores: list[dict[str, Any]] = []
    for store in graph.stores:
        plain: dict[str, Any] = {}
        for key, item in store.items():
            if isinstance(item, Tensor):
                tensors[f"{len(stores)}/{key}"] = item.detach().cpu().contiguous().clone()
            else:
                plain[key] = item
        stores.append({"of": list(store._key) if isinstance(store._key, tuple) else store._key, "plain": plain})
    make_folder(path.parent)
    write_atomically(path, save(tensors, {"graph": json.dumps({"schema": SCHEMA, "stores": stores})}))
    return path


def load_graph(path: str | Path) -> "HeteroData":
    """Read a graph that :func:`save_graph` wrote.

    Raises:
        InputError: There is no such file, it is damaged, or of another schema version.
    """
    from torch_geometric.data import HeteroData

    path = Path(path)
    if not path.is_file():
        raise InputError(f"a graph must be a file, but {path} does not exist.")
    graph = HeteroData()
    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})["graph"])
            if content["schema"] != SCHEMA:
                raise InputError(
                    f"{path} has schema {content['schema']!r}, but this version reads {SCHEMA}. Make the graph again."
                )
            stores = [_store(graph, item["of"]) for item in content["stores"]]
            for store, item in zip(stores, content["stores"], strict=True):
                for key, value in item["plain"].items():
                    store[key] = value
            for name in list(file.keys()):
                index, _, key = name.partition("/")
                stores[int(index)][key] = file.get_tensor(name)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{path} must be a graph, but cannot be read ({type(error).__name__}: {error}).") from error
    return graph


def _store(graph: "HeteroData", of: Any) -> Any:
    if of is None:
        return graph._global_store
    return graph[tuple(of)] if isinstance(of, list) else graph[of]


def _put(graph: "HeteroData", node: int, place: Place, value: Tensor, dense: bool) -> None:
    out, into = torch.from_numpy(place.out), torch.from_numpy(place.into)
    ends = {"edge": ("unit", "unit"), "feature": ("parameter", "unit"), "rest": ("parameter", "parameter")}
    source, target = ends[place.kind]
    store = graph[source, place.name, target]
    store.node = node
    store.form = list(place.form)
    if place.kind == "edge" and dense:
        store.block, store.out, store.into = value, out, into
    elif place.kind == "edge":
        groups, rows, columns = place.form[:3]
        made = out.view(groups, rows, 1).expand(groups, rows, columns)
        read = into.view(groups, 1, columns).expand(groups, rows, columns)
        store.edge_index = torch.stack([read.reshape(-1), made.reshape(-1)])
        store.edge_attr = value.reshape(groups * rows * columns, -1)
    elif place.kind == "feature":
        store.edge_index = torch.stack([torch.full_like(out, node), out])
        store.edge_attr = value.reshape(len(out), -1)
    else:
        store.edge_index = torch.tensor([[node], [node]])
        store.edge_attr = value.reshape(1, -1)


def _take(name: str, source: str, target: str, store: Any) -> GraphTensor:
    form, node = list(store.form), int(store.node)
    if "block" in store:
        return GraphTensor(name, "edge", node, store.block, store.out, store.into)
    value, (read, made) = store.edge_attr.reshape(form), store.edge_index
    if source == "unit":
        out = made.view(form[:3])[:, :, 0].reshape(-1)
        return GraphTensor(name, "edge", node, value, out, read.view(form[:3])[:, 0].reshape(-1))
    empty = read[:0]
    return GraphTensor(
        name, "feature" if target == "unit" else "rest", node, value, made if target == "unit" else empty, empty
    )


def _feeds(places: Places) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Pairs of axes between which a weight leads, each once, shape (2, pairs)."""
    needs: dict[int, list[int]] = {}
    for node, unit in places.needs.T.tolist():
        needs.setdefault(node, []).append(unit)

    def axes(nodes: np.ndarray[Any, np.dtype[np.int64]]) -> set[int]:
        units = {unit for node in np.unique(nodes).tolist() for unit in needs.get(node, [node])}
        return {int(places.axis_of[unit]) for unit in units if unit < len(places.axis_of)}

    pairs = {
        (read, made)
        for place in places.places.values()
        if place.kind == "edge"
        for read in axes(place.into)
        for made in axes(place.out)
    }
    return np.array(sorted(pairs), np.int64).reshape(-1, 2).T
