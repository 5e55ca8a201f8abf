"""``metaprune metatrain``: trained networks in, a metanetwork out that makes others easier to prune."""

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from metaprune.cli.options import NETWORK, OUTPUT, AsJson, Debug

TRAINING = "Meta-training"


def metatrain(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help="A YAML file, or the name of a shipped one (`metaprune list configs`), e.g. default."
        ),
    ],
    population: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Where the trained networks are kept; those that are there are used. [population in --out]",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Processes that train and measure networks. [cores]", rich_help_panel=NETWORK
        ),
    ] = None,
    accelerator: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE", help="Where networks are trained: auto, cpu or cuda. [auto]", rich_help_panel=NETWORK
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Of the metanetwork. [1500, or the recipe's]", rich_help_panel=TRAINING),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Decides every random number here; networks have their own. [0, or the recipe's]",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where files go. [runs/metatrain-DATE-TIME]", rich_help_panel=OUTPUT),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Delete what an earlier run left there, its networks too.", rich_help_panel=OUTPUT
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted run left there.", rich_help_panel=OUTPUT)
    ] = False,
    track: Annotated[
        bool, typer.Option("--track/--no-track", help="Keep a run in MLflow.", rich_help_panel=OUTPUT)
    ] = True,
    tracking_uri: Annotated[
        str | None,
        typer.Option(metavar="URI", help="MLflow store. [sqlite:///mlflow.db]", rich_help_panel=OUTPUT),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Train a metanetwork on a population of networks.

    The networks are trained first, where they are not there yet. The metanetwork
    is chosen on networks and images that it did not learn from. Everything that
    can be wrong is looked at before any work begins.
    """
    from metaprune.cli.metacourse import Order, carry_out, draw, read_recipe
    from metaprune.cli.screen import Screen
    from metaprune.tracking import without_password

    folder = Path(out) if out else Path("runs") / f"metatrain-{time.strftime('%Y%m%d-%H%M%S')}"
    flags = {
        "population": population,
        "workers": workers,
        "accelerator": accelerator,
        "steps": steps,
        "seed": seed,
        "tracking-uri": without_password(tracking_uri) or None,
        "out": folder,
    }
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    order = Order(
        asked=read_recipe(recipe, steps=steps, seed=seed),
        folder=folder,
        population=folder / "population" if population is None else Path(population),
        workers=workers,
        accelerator=accelerator or "auto",
        track=track,
        tracking_uri=tracking_uri,
        again=shlex.join(["metaprune", "metatrain", recipe, *words, *([] if track else ["--no-track"])]),
        force=force,
        resume=resume,
    )
    screen = Screen(as_json)
    told = carry_out(order, screen)
    screen.show(told, lambda console: draw(told, console))
    return 0
