"""``metaprune inspect``: the axes of a network as a tree, before anything is done to it."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from metaprune.cli.answer import answer
from metaprune.cli.options import AsJson, Debug, Freeze, InputShape, Model, ModelArg, Only, Rules, Weights

if TYPE_CHECKING:
    from rich.console import Console
    from rich.tree import Tree

    from metaprune.graph.why import Why


def inspect(
    model: Model = None,
    weights: Weights = None,
    input_shape: InputShape = None,
    model_arg: ModelArg = None,
    rules: Rules = None,
    freeze: Freeze = None,
    only: Only = None,
    why: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Say what couples an axis, a parameter (conv1.weight:0) or a module, or why it must stay.",
        ),
    ] = None,
    frozen: Annotated[bool, typer.Option("--frozen/--no-frozen", help="Also show axes that must stay.")] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Show what may be cut, and why the rest must stay.

    Every axis with its size, what it couples, and its share of the cost.
    """
    from rich.text import Text

    from metaprune.cli.screen import Screen
    from metaprune.errors import ConfigError
    from metaprune.graph import trace
    from metaprune.graph.show import axis_rows, axis_tree
    from metaprune.report import numbers
    from metaprune.subject import model_args, read_subject, shape_of

    if model is None:
        raise ConfigError("`--model` is needed, but was not given. `metaprune list models` shows those of the zoo.")
    screen = Screen(as_json)
    subject = read_subject(
        model, weights=weights, input_shape=shape_of(input_shape), model_args=model_args(model_arg),
        rules=rules or (),
    )  # fmt: skip
    start = time.perf_counter()
    network = trace(subject.module, subject.source.example_inputs, freeze=freeze, only=only)
    explained = () if why is None else network.why(why)
    seconds = round(time.perf_counter() - start, 3)
    cost = network.cost()
    told = answer(
        "inspect",
        model=subject.source.spec,
        weights=weights,
        before={
            "metrics": {},
            "macs": cost.macs,
            "params": cost.params,
            "bytes": cost.bytes,
            "latency_ms": None,
        },
        activations=cost.activations,
        axes=axis_rows(network),
        why=None if why is None else [one.to_json() for one in explained],
        fingerprint=network.fingerprint,
        seconds={"trace": seconds, "total": seconds},
    )

    def draw(console: "Console") -> None:
        if why is not None:
            console.print(_explanation(why, explained))
            return
        console.print(axis_tree(network, title=subject.source.spec, frozen=frozen))
        console.print(
            Text(
                f"{numbers.count(cost.macs)} MACs per sample, {numbers.count(cost.params)} parameters, "
                f"{numbers.size(cost.bytes)}; traced in {seconds:.2f} s"
            )
        )

    screen.show(told, draw)
    return 0


def _explanation(name: str, explained: "tuple[Why, ...]") -> "Tree":
    """Sentences as a tree: each below the one that it follows from."""
    from rich.markup import escape
    from rich.tree import Tree

    tree = Tree(f"[bold]{escape(name)}[/]")
    for one in explained:
        axis = one.axis
        state = "[green]may be cut[/]" if axis.prunable else f"[red]must stay[/]: {escape(axis.reason)}"
        top = tree.add(f"axis [bold]{escape(axis.name)}[/], {axis.size} units, {state}")
        if one.chain:
            way = top.add(f"[red]from {escape(one.start)} to the reason[/]")
            for link in one.chain:
                way.add(escape(str(link)))
            way.add(f"{escape(one.end)}: {escape(axis.reason)}")
        nodes = {one.start: top}
        for link in one.links:
            node = nodes[link.known].add(escape(str(link)))
            nodes |= dict.fromkeys(link.new, node)
        for other, first in one.tied.items():
            top.add(escape(f"{other} and {first} are one tensor"))
    return tree
