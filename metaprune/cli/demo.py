"""``metaprune demo``: the whole way on digits, in less than a minute and without a file or a network."""

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from metaprune.cli.options import OUTPUT, AsJson, Debug

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from metaprune.cli.screen import Watch
    from metaprune.run import Run
    from metaprune.subject import Subject

MODEL, DATA, BUDGET = "zoo:digits_cnn", "digits", "macs=0.5"
ROUND_TO = 8  # odd numbers of channels are slower on most processors than the dense network
WELCOME = """
Welcome to metaprune. We take 1,797 handwritten digits, train a small network
to read them, cut it to half its multiplications, heal it, and prove that what
is left still works. Nothing is downloaded, and it takes less than a minute.
"""
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
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Train a small network on digits, cut it, heal it, prove it.

    Takes less than a minute, downloads nothing, and ends with what to try next.
    """
    from pathlib import Path

    import torch

    from metaprune.cli.course import Order, carry_out, finish
    from metaprune.cli.screen import Screen
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
    screen.say(WELCOME)
    folder = Path(out)
    words = ["metaprune", "demo", "--out", out]
    words += ["--seed", str(seed)] if seed else []
    words += [] if track else ["--no-track"]
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
    return finish(carry_out(order, screen), screen)


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


def _ideas(folder: "Path") -> tuple[str, ...]:
    weights = str(folder / "dense.safetensors")
    network: list[Any] = ["--model", MODEL, "--weights", weights]
    return (
        shlex.join(["metaprune", "inspect", *network]),
        shlex.join(["metaprune", "prune", *network, "--data", DATA, "--budget", "macs=0.3", "--recovery", "finetune"]),
    )
