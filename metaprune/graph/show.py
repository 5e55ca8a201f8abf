"""A network's axes for the eye: one tree, as wide as the terminal."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from metaprune.graph.axes import Axis
from metaprune.graph.network import Network

if TYPE_CHECKING:
    from rich.tree import Tree

_NOUN = {"channel": "channels", "group": "groups", "head": "heads", "head_dim": "head dims", "hidden": "hidden units"}


def axis_rows(network: Network) -> list[dict[str, Any]]:
    """Every axis as plain data: name, size, kind, prunable, reason, shares of cost, and the layers that it couples.

    A share is that part of a cost which has the axis as a factor; shares of different axes overlap.
    """
    shares = network.shares()
    return [
        {
            "name": axis.name,
            "size": axis.size,
            "kind": axis.kind,
            "prunable": axis.prunable,
            "reason": axis.reason,
            "droppable": axis.droppable,
            "changes": list(axis.changes),
            "macs_share": shares[axis.name]["macs"],
            "params_share": shares[axis.name]["params"],
            "makes": coupled(axis, made=True),
            "reads": coupled(axis, made=False),
        }
        for axis in network.axes
    ]


def coupled(axis: Axis, *, made: bool) -> list[str]:
    """Modules that make the units (or carry them along), or those that read them; each once, in order."""
    bindings = [binding for binding in axis.bindings if (binding in axis.consumers) != made]
    return list(dict.fromkeys(_module(name) for name, _ in bindings))


def axis_tree(network: Network, *, title: str, frozen: bool = True) -> "Tree":
    """The axes as a tree of :mod:`rich`: prunable ones first, then those that must stay, each with its reason."""
    from rich.markup import escape
    from rich.tree import Tree

    tree = Tree(f"[bold]{escape(title)}[/]")
    rows = axis_rows(network)
    free = tree.add(f"[green]prunable[/] {_axes(sum(row['prunable'] for row in rows))}")
    for row in (row for row in rows if row["prunable"]):
        node = free.add(_headline(row))
        _add_coupled(node, row)
        if row["changes"]:
            node.add(f"[yellow]changes[/] the statistics of {escape(_short(row['changes'], 2))}")
    stuck = [row for row in rows if not row["prunable"]]
    if frozen and stuck:
        stays = tree.add(f"[red]must stay[/] {_axes(len(stuck))}")
        for row in stuck:
            node = stays.add(_headline(row))
            node.add(f"[red]because[/] {escape(row['reason'])}")
            _add_coupled(node, row)
    return tree


def _headline(row: Mapping[str, Any]) -> str:
    from rich.markup import escape

    marks = [
        f"{row['size']} {_NOUN[row['kind']]}",
        f"{row['macs_share']:.1%} of MACs",
        f"{row['params_share']:.1%} of params",
        *(["branch can leave whole"] if row["droppable"] else []),
    ]
    return f"[bold]{escape(row['name'])}[/]  {', '.join(marks)}"


def _add_coupled(node: "Tree", row: Mapping[str, Any]) -> None:
    from rich.markup import escape

    if row["makes"]:
        node.add(f"[dim]made and carried by[/] {escape(_short(row['makes']))}")
    if row["reads"]:
        node.add(f"[dim]read by[/] {escape(_short(row['reads']))}")


def _axes(count: int) -> str:
    return f"{count} axis" if count == 1 else f"{count} axes"


def _module(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return module if module and leaf.startswith(("weight", "bias", "running", "in_proj")) else name


def _short(items: Iterable[str], limit: int = 6) -> str:
    items = list(items)
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest
