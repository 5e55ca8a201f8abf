"""Numbers about networks and files: each with its unit, its sample size, its spread, and where it comes from."""

from metaprune.measure.accuracy import Accuracy, Paired, Split, accuracy, compare
from metaprune.measure.distortion import distortion, output_error
from metaprune.measure.host import Host, host
from metaprune.measure.latency import Arm, Comparison, Latency, latency
from metaprune.measure.memory import Memory, memory
from metaprune.measure.profile import Node, profile, shares_by_module
from metaprune.measure.quantity import Label, Quantity

__all__ = [
    "Accuracy",
    "Arm",
    "Comparison",
    "Host",
    "Label",
    "Latency",
    "Memory",
    "Node",
    "Paired",
    "Quantity",
    "Split",
    "accuracy",
    "compare",
    "distortion",
    "host",
    "latency",
    "memory",
    "output_error",
    "profile",
    "shares_by_module",
]
