"""metaprune: structural pruning for PyTorch.

>>> import torch, metaprune as mp
>>> from metaprune import zoo
>>> net = mp.trace(zoo.build("mlp"), zoo.example_inputs("mlp"))
>>> plan = mp.plan(net, budget="macs=0.5")
>>> slim = net.apply(plan)
>>> net.verify(plan).max_error < 1e-5
True
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaprune import errors
    from metaprune.graph import Network, register_rule, trace
    from metaprune.pipeline import Result, load, prune
    from metaprune.planning import plan
    from metaprune.plans import Plan
    from metaprune.sparsity import sparsify
    from metaprune.stream import parameters_on_meta, prune_files

__version__ = "0.1.0"
__all__ = [
    "Network",
    "Plan",
    "Result",
    "errors",
    "load",
    "parameters_on_meta",
    "plan",
    "prune",
    "prune_files",
    "register_rule",
    "sparsify",
    "trace",
]

# Loaded when first asked for, because torch takes a second to import and most commands answer without it.
_HOMES = {
    "Network": "metaprune.graph",
    "Plan": "metaprune.plans",
    "Result": "metaprune.pipeline",
    "errors": "metaprune.errors",
    "load": "metaprune.pipeline",
    "parameters_on_meta": "metaprune.stream",
    "plan": "metaprune.planning",
    "prune": "metaprune.pipeline",
    "prune_files": "metaprune.stream",
    "register_rule": "metaprune.graph",
    "sparsify": "metaprune.sparsity",
    "trace": "metaprune.graph",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'metaprune' has no attribute {name!r}")
    home = import_module(_HOMES[name])
    return home if name == "errors" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted(__all__)
