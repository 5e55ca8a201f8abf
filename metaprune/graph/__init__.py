"""A network as axes: tracing, cost, surgery, verification."""

from metaprune.graph.axes import Axis
from metaprune.graph.cost import Cost
from metaprune.graph.network import Network, UnitSums, trace
from metaprune.graph.verify import Verification

__all__ = ["Axis", "Cost", "Network", "UnitSums", "Verification", "trace"]
