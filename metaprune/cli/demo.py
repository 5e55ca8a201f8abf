"""``metaprune demo``: the whole way on digits, then a search, without a file or a network."""

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaprune.cli.options import DECISION, OUTPUT, AsJson, Debug

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import Console
    from torch import nn

    from metaprune.cli.course import Order
    from metaprune.cli.screen import Screen, Watch
    from metaprune.run import Run
    from metaprune.subject import Subject

MODEL, DATA, BUDGET = "zoo:digits_cnn", "digits", "macs=0.5"
ROUND_TO = 8  # odd numbers of channels are slower on most processors than the dense network
WELCOME = """
Welcome to metaprune. We take 1,797 handwritten digits, train a small network
to read them, cut it to half its multiplications, heal it, and prove that what
is left still works. {rest}
"""
PRUNES = "Nothing is downloaded, and it takes half a minute."
SEARCHES = "Then we search for better ways to cut it. Nothing is\ndownloaded, and it takes about a minute."
SEARCHING = """
Now it is pruned in {trials} ways, the best are trained a little more, and what
nothing else beats stays. Ctrl-C keeps what was found.
"""
CAMPAIGN = "digits"  # of `metaprune search run`
FOUND = "search"  # its folder below that of the demo
# Chosen on the validation split alone; tests/cli/test_demo.py holds what they give on the test split.
DENSE: dict[str, Any] = {"epochs": 20, "lr": 0.1, "batch_size": 64}
RECOVERY: dict[str, Any] = {"epochs": 10, "lr": 0.05, "batch_size": 64, "distil": 0.5}


def demo(
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where files go. [demo]", rich_help_panel=OUTPUT)] = "demo",
    force: Annotated[
        bool, typer.Option("--force", help="Delete what an earlier run left there.", rich_help_panel=OUTPUT)
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted run left there.", rich_help_panel=OUTPUT)
    ] = False,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Decides every random number. [0]", rich_help_panel=OUTPUT)
    ] = 0,
    track: Annotated[
        bool, typer.Option("--track/--no-track", help="Keep a run in MLflow.", rich_help_panel=OUTPUT)
    ] = True,
    tracking_uri: Annotated[
        str | None,
        typer.Option(metavar="URI", help="MLflow store. [sqlite:///mlflow.db]", rich_help_panel=OUTPUT),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search/--no-search", help="Look for better cuts afterwards.", rich_help_panel=DECISION)
    ] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Train a small network on digits, cut it, heal it, prove it, and search for more.

    Takes about a minute, downloads nothing, and ends with what to try next.
    """
    from pathlib import Path

    import torch

    from metaprune.cli.course import Order, carry_out, finish
    from metaprune.cli.failure import Interrupted
    from metaprune.cli.screen import Screen
    from metaprune.cli.summary import draw
    from metaprune.config import prune_options
    from metaprune.tracking import without_password

    options = prune_options(
        {
            "model": MODEL,
            "data": DATA,
            "budget": BUDGET,
            "round_to": ROUND_TO,
            "recovery": "finetune",
            **RECOVERY,
            "seed": seed,
            "accelerator": "cpu",
            "out": out,
            "track": track,
            "tracking_uri": tracking_uri,
        }
    )
    torch.set_num_threads(1)  # more gain nothing on so small a network, and results would hang on their number
    screen = Screen(as_json)
    screen.say(WELCOME.format(rest=SEARCHES if search else PRUNES))
    folder = Path(out)
    words = ["metaprune", "demo", "--out", out]
    words += ["--seed", str(seed)] if seed else []
    words += [] if track else ["--no-track"]
    words += [] if search else ["--no-search"]
    words += ["--tracking-uri", without_password(tracking_uri)] if tracking_uri else []
    order = Order(
        command="demo",
        options=options,
        folder=folder,
        again=shlex.join(words),
        force=force,
        resume=resume,
        ideas=_ideas(folder),
        prepare=_train,
    )
    told = {"search": None, **carry_out(order, screen)}
    if not search:
        return finish(told, screen)
    try:
        if not as_json:
            draw({**told, "next": []}, screen.out)
        if told["search"] is None:
            told = _search(told, order, screen)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"{order.again} --resume", kept=True) from None
    return finish(told, screen, _draw_search)


def _train(subject: "Subject", run: "Run", watch: "Watch") -> "nn.Module":
    """The dense network, trained as if it came from somebody else, and kept beside the result."""
    from safetensors.torch import save

    from metaprune.cli.summary import DENSE_WEIGHTS
    from metaprune.files import write_atomically
    from metaprune.recovery import Context, Finetune

    assert subject.dataset is not None
    watch.step("Training the network that is to be pruned")
    recipe = Finetune(**DENSE, recalibrate=False)
    context = Context(
        train=subject.dataset.train,
        seed=run.load()["options"]["seed"],
        folder=run.folder / "checkpoints" / "dense",
        resume=run.resumed,
        progress=watch,
    )
    trained = recipe.recover(subject.module, context).model.eval()
    weights = {name: tensor.contiguous() for name, tensor in trained.state_dict().items()}
    write_atomically(run.path(DENSE_WEIGHTS), save(weights))
    watch.end()
    return trained


def _search(told: dict[str, Any], order: "Order", screen: "Screen") -> dict[str, Any]:
    """A campaign on the network that was trained here, begun or gone on with, in a folder of its own.

    Returns:
        The answer with what was found.
    """
    from dataclasses import replace

    from metaprune.cli import searchcourse
    from metaprune.cli.course import keep
    from metaprune.cli.summary import DENSE_WEIGHTS
    from metaprune.run import RECORD, locked
    from metaprune.search.settings import read_settings

    folder, options = order.folder / FOUND, order.options
    weights = str(order.folder / DENSE_WEIGHTS)
    settings = replace(read_settings(CAMPAIGN), train=None, weights=weights, seed=options.seed)
    tracking = searchcourse.Order(track=options.track, tracking_uri=options.tracking_uri)
    screen.say(SEARCHING.format(trials=settings.stop.trials))
    with locked(order.folder):  # a second demo must not delete what is searched in
        found = searchcourse.carry_out(settings, folder, tracking, screen, resume=(folder / RECORD).exists())
        seconds = {**told["seconds"], "search": found["seconds"]["total"]}
        seconds["total"] = round(told["seconds"]["total"] + seconds["search"], 3)
        more = f"{found['reproduce']} --trials {2 * settings.stop.trials}"
        told = {**told, "search": found, "seconds": seconds, "next": [more, *told["next"]]}
        keep(told, order.folder)
    return told


def _draw_search(told: "Mapping[str, Any]", console: "Console") -> None:
    """What was found, and what to try next; the network that was pruned first has been shown."""
    from rich.text import Text

    from metaprune.cli.searchboard import draw_tested, front_table
    from metaprune.cli.summary import REPORT, draw_next

    found = told["search"]
    console.print()
    goals = " and ".join(found["objectives"])
    console.print(f"Of the last {found['points']} networks none beats these in {goals} together:")
    console.print()
    console.print(front_table(found["front"], found["objectives"]))
    console.print()
    draw_tested(found["networks"], console)
    console.print(Text.assemble(("Report  ", "bold"), found["files"][REPORT]), soft_wrap=True)
    draw_next(told["next"], console)


def _ideas(folder: "Path") -> tuple[str, ...]:
    weights = str(folder / "dense.safetensors")
    network: list[Any] = ["--model", MODEL, "--weights", weights]
    return (
        shlex.join(["metaprune", "inspect", *network]),
        shlex.join(["metaprune", "prune", *network, "--data", DATA, "--budget", "macs=0.3", "--recovery", "finetune"]),
    )
