"""A network as axes: tracing, cost, surgery, verification."""

from metaprune.graph.axes import Axis, Dim
from metaprune.graph.convert import GraphTensor, load_graph, save_graph, tensors_of
from metaprune.graph.cost import Cost
from metaprune.graph.dispatch import Call
from metaprune.graph.entries import Entries
from metaprune.graph.network import Network, UnitSums, trace
from metaprune.graph.rules import register_rule
from metaprune.graph.verify import Verification

__all__ = [
    "Axis",
    "Call",
    "Cost",
    "Dim",
    "Entries",
    "GraphTensor",
    "Network",
    "UnitSums",
    "Verification",
    "load_graph",
    "register_rule",
    "save_graph",
    "tensors_of",
    "trace",
]
