"""``metaprune search``: a campaign of many prunings, by as many processes as there are, until a front is found."""

from typing import Annotated

import typer

from metaprune.cli.options import OUTPUT, AsJson, Debug

CONFIG = "A YAML file, or the name of a shipped one (`metaprune list configs`), e.g. digits."

Config = Annotated[str, typer.Argument(metavar="CONFIG", help=CONFIG)]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="Of a campaign.")]
Workers = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="Processes on this machine; 0 leaves all work to others. [the config's]"),
]
Storage = Annotated[
    str | None,
    typer.Option(metavar="URL", help="postgresql://…, grpc://HOST:PORT, … [a journal in the folder]"),
]
Trials = Annotated[int | None, typer.Option(metavar="N", min=1, help="Of the first rung. [the config's]")]
Seconds = Annotated[
    float | None, typer.Option(metavar="S", min=1, help="No trial begins later than this. [the config's]")
]
Track = Annotated[bool, typer.Option("--track/--no-track", help="Keep it in MLflow.", rich_help_panel=OUTPUT)]
TrackingUri = Annotated[
    str | None, typer.Option(metavar="URI", help="MLflow store. [sqlite:///mlflow.db]", rich_help_panel=OUTPUT)
]


def space(config: Config, as_json: AsJson = False, debug: Debug = False) -> int:
    """What may be chosen, and what every network can cost, before anything runs."""
    from metaprune.cli.searchcourse import show_space

    return show_space(config, as_json)


def run(
    config: Config,
    workers: Workers = None,
    storage: Storage = None,
    trials: Trials = None,
    seconds: Seconds = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where files go. [runs/search-NAME]", rich_help_panel=OUTPUT),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Delete what an earlier run left there.", rich_help_panel=OUTPUT)
    ] = False,
    track: Track = True,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Search: baselines first, then what the sampler proposes.

    Ctrl-C keeps what was found and prints the command that goes on.
    """
    from metaprune.cli.searchcourse import Order, begin

    order = Order(
        workers=workers, storage=storage, trials=trials, seconds=seconds, track=track, tracking_uri=tracking_uri,
        as_json=as_json,
    )  # fmt: skip
    return begin(config, out, force, order)


def resume(
    folder: Folder,
    workers: Workers = None,
    trials: Trials = None,
    seconds: Seconds = None,
    track: Track = True,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Go on with a campaign, also with one that has ended, for more trials."""
    from metaprune.cli.searchcourse import Order, go_on

    order = Order(
        workers=workers, storage=None, trials=trials, seconds=seconds, track=track, tracking_uri=tracking_uri,
        as_json=as_json,
    )  # fmt: skip
    return go_on(folder, order)


def status(folder: Folder, as_json: AsJson = False, debug: Debug = False) -> int:
    """Where a campaign stands; may be asked while it runs."""
    from metaprune.cli.searchcourse import show_status

    return show_status(folder, as_json)


def worker(
    folder: Folder,
    index: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Of its random draws, another for each. [by its name]")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Help with a campaign until it is over; start as many as you like, anywhere.

    The folder must be visible where the worker runs. A worker may be killed at any
    moment: others take up what it held.
    """
    from metaprune.cli.searchcourse import help_out

    return help_out(folder, index, as_json)


def sync(folder: Folder, tracking_uri: TrackingUri = None, as_json: AsJson = False, debug: Debug = False) -> int:
    """Write a campaign to MLflow, what is there already once."""
    from metaprune.cli.searchcourse import synchronise

    return synchronise(folder, tracking_uri, as_json)


def export(
    folder: Folder,
    bench: Annotated[bool, typer.Option("--bench/--no-bench", help="Time dense against pruned.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Write the networks of the front, each with its plan, its ONNX file and every check."""
    from metaprune.cli.searchcourse import write_front

    return write_front(folder, bench, as_json)


VERBS = (space, run, resume, status, worker, sync, export)
