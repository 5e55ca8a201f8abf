"""``metaprune prune``: a trained network in, a smaller one out, with every proof that can be had."""

import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from metaprune.cli.options import (
    DECISION,
    NETWORK,
    OUTPUT,
    RECOVERY,
    AsJson,
    Data,
    Debug,
    Device,
    Freeze,
    InputShape,
    Model,
    ModelArg,
    Only,
    Rules,
    Weights,
)


def prune(
    model: Model = None,
    weights: Weights = None,
    data: Data = None,
    input_shape: InputShape = None,
    model_arg: ModelArg = None,
    rules: Rules = None,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="classification, feature_matching or package.module:factory.", rich_help_panel=NETWORK
        ),
    ] = None,
    freeze: Freeze = None,
    only: Only = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="BUDGET",
            help="E.g. macs=0.5, or params=0.3,bytes=256KB; nonzeros=0.5 for entries.",
            rich_help_panel=DECISION,
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Where single entries stay: 2:4; or with --budget nonzeros=0.5, n:4, row or any.",
            rich_help_panel=DECISION,
        ),
    ] = None,
    device: Device = None,
    metanet: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FILE",
            help="A metanetwork that first makes the network easier to prune: one that ships (`metaprune list "
            "metanets`), or a file of `metaprune metatrain`.",
            rich_help_panel=DECISION,
        ),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What a unit is worth. [metanet with --metanet, taylor with data, else l2]",
            rich_help_panel=DECISION,
        ),
    ] = None,
    allocator: Annotated[
        str | None, typer.Option(metavar="NAME", help="How much each axis may lose. [global]", rich_help_panel=DECISION)
    ] = None,
    round_to: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Sizes are multiples of this; or by kind of axis: channel=8,head=2. [--device, else 1]",
            rich_help_panel=DECISION,
        ),
    ] = None,
    floor: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Share of every axis that must stay; or by patterns of their names: 'layer1.*=0.5'. [0.1]",
            rich_help_panel=DECISION,
        ),
    ] = None,
    ceiling: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE", help="Share of every axis that may stay, likewise. [1]", rich_help_panel=DECISION
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Look again at what is left, so many times in all. [1]", rich_help_panel=DECISION
        ),
    ] = None,
    calibration: Annotated[
        int | None, typer.Option(metavar="N", help="Training samples to look at. [2048]", rich_help_panel=DECISION)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Decides every random number. [0]", rich_help_panel=DECISION)
    ] = None,
    recovery: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="One or more, separated by commas, or none. [recalibrate_norm with data]",
            rich_help_panel=RECOVERY,
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", help="Of training. [3]", rich_help_panel=RECOVERY)] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="Highest learning rate. [as the recovery has it: 0.01; 0.0005 for perp]",
            rich_help_panel=RECOVERY,
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Samples per step. [128]", rich_help_panel=RECOVERY)
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Pull of weights towards zero. [as the recovery has it: 0.0005; 0 for perp]",
            rich_help_panel=RECOVERY,
        ),
    ] = None,
    distil: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Weight of the dense network as a teacher. [as the recovery has it: 0 for finetune, 0.9 for distil]",
            rich_help_panel=RECOVERY,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", help="Of the distillation, by finetune or distil. [4]", rich_help_panel=RECOVERY),
    ] = None,
    set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND.OPTION=VALUE",
            help="Any option of the criterion, allocator or recovery, e.g. criterion.samples=256, or of one recovery: "
            "recovery.perp.rank=8; as often as needed. `metaprune list recoveries perp` shows them.",
            rich_help_panel=RECOVERY,
        ),
    ] = None,
    accelerator: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="auto, cpu or cuda. [auto]", rich_help_panel=RECOVERY)
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Cut weights from file to file, never holding the network; --weights may be a folder of shards.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Where files go. [runs/MODEL-DATE-TIME]", rich_help_panel=OUTPUT),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Delete what an earlier run left there.", rich_help_panel=OUTPUT)
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted run left there.", rich_help_panel=OUTPUT)
    ] = False,
    export: Annotated[
        bool | None, typer.Option("--export/--no-export", help="Write and check ONNX files.", rich_help_panel=OUTPUT)
    ] = None,
    bench: Annotated[
        bool | None, typer.Option("--bench/--no-bench", help="Time dense against pruned.", rich_help_panel=OUTPUT)
    ] = None,
    track: Annotated[
        bool | None, typer.Option("--track/--no-track", help="Keep a run in MLflow.", rich_help_panel=OUTPUT)
    ] = None,
    tracking_uri: Annotated[
        str | None,
        typer.Option(metavar="URI", help="MLflow store. [sqlite:///mlflow.db]", rich_help_panel=OUTPUT),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A recipe in YAML, or the name of a shipped one; flags override it."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Make a network smaller, heal it, export it and prove it.

    Everything that can be wrong is looked at before any work begins. Accuracy is
    reported on the test split and decides nothing.
    """
    given: dict[str, Any] = {
        "model": model,
        "weights": weights,
        "data": data,
        "input_shape": input_shape,
        "task": task,
        "rules": rules,
        "freeze": freeze,
        "only": only,
        "budget": budget,
        "pattern": pattern,
        "device": device,
        "metanet": metanet,
        "criterion": criterion,
        "allocator": allocator,
        "round_to": round_to,
        "floor": floor,
        "ceiling": ceiling,
        "rounds": rounds,
        "calibration": calibration,
        "seed": seed,
        "recovery": recovery,
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "weight_decay": weight_decay,
        "distil": distil,
        "temperature": temperature,
        "accelerator": accelerator,
        "stream": stream,
        "export": export,
        "bench": bench,
        "out": out,
        "track": track,
        "tracking_uri": tracking_uri,
    }
    from metaprune.config import load_recipe, place_of, prune_options, set_entries

    given["set"] = set_entries(set)
    recipe = None if config is None else load_recipe(config)  # before torch is imported: it is what most often fails
    from metaprune.allocate import ALLOCATORS
    from metaprune.budget import entry_budget
    from metaprune.cli.course import Order, carry_out, command_line, finish
    from metaprune.cli.screen import Screen
    from metaprune.criteria import CRITERIA
    from metaprune.recovery import RECOVERIES
    from metaprune.subject import model_args

    names = {"criterion": tuple(CRITERIA), "allocator": tuple(ALLOCATORS), "recovery": tuple(RECOVERIES)}
    options = prune_options(given | {"model_args": model_args(model_arg)}, recipe, names)
    if sparse := entry_budget(options.budget, options.pattern):
        options = options.model_copy(update={"budget": str(sparse)})
    folder = Path(options.out) if options.out else _new_folder(options.model)
    screen = Screen(as_json)
    order = Order(
        command="prune",
        options=options,
        folder=folder,
        again=command_line(options, folder),
        where=partial(place_of, flags=given, recipe=recipe),
        force=force,
        resume=resume,
    )
    if options.stream:
        from metaprune.cli.streaming import stream_out

        return finish(stream_out(order, screen), screen)
    return finish(carry_out(order, screen), screen)


def _new_folder(model: str) -> Path:
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in model.rpartition(":")[2])
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
