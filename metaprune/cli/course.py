"""The course of `prune` and `demo`: check everything, cut and heal, then deliver files that are proved.

Order is what protects the user: nothing is written before all that can be wrong has been looked at, and a result lies
on disk before the steps that may still fail.
"""

import json
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from metaprune.allocate import ALLOCATORS
from metaprune.budget import entry_budget, parse_budget
from metaprune.cli.delivery import Delivery, deliver
from metaprune.cli.errand import Errand, run_errand
from metaprune.cli.methods import Methods, read_methods
from metaprune.cli.screen import Screen, Watch, finite
from metaprune.cli.summary import OUTCOME, draw, gates_failed, outcome
from metaprune.config import PruneOptions
from metaprune.criteria import CRITERIA, MetanetScore, require_entrywise
from metaprune.errors import ConfigError, GateError
from metaprune.export.devices import Settings, load_device, settings_for
from metaprune.files import write_atomically
from metaprune.graph import trace
from metaprune.metanet import load_checkpoint
from metaprune.methods import named, spelt
from metaprune.pipeline import Result, prune
from metaprune.planning import RoundTo, calibration_batches, reachable_limits, with_times
from metaprune.plans import Plan
from metaprune.recovery import Context, torch_device
from metaprune.run import Run
from metaprune.sparsity import reachable_entries
from metaprune.subject import CLASSIFICATION, Subject, read_subject
from metaprune.task import resolve_task
from metaprune.tracking import Tracker, without_password

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Order:
    """What one command is to do.

    Args:
        command: The verb.
        options: What was asked for.
        folder: Where the files go.
        again: The command line, without ``--force`` and ``--resume``.
        where: The place of a key of the options, or of ``set.ENTRY``, for messages.
        force: Delete what an earlier run left in the folder.
        resume: Go on with it.
        ideas: Command lines to try next, beside the usual ones.
        prepare: Makes the dense network after all checks, e.g. by training it; None takes it as it was read.
    """

    command: str
    options: PruneOptions
    folder: Path
    again: str
    where: Callable[[str], str] = "`{}`".format
    force: bool = False
    resume: bool = False
    ideas: tuple[str, ...] = ()
    prepare: Callable[[Subject, Run, Watch], nn.Module] | None = None


def carry_out(order: Order, screen: Screen) -> dict[str, Any]:
    """Do it.

    Returns:
        What the command answers.

    Raises:
        MetapruneError: Something does not fit (nothing was written), or failed on the way (what was done is kept).
        Interrupted: The user pressed Ctrl-C.
    """
    _check_training(order.options)
    methods = read_methods(order.options, order.where)
    options = order.options.model_copy(update={"set": methods.options})
    errand = Errand(
        command=order.command,
        folder=order.folder,
        deciding=options.deciding,
        params=options.model_dump(mode="json", exclude={"tracking_uri"}),
        again=order.again,
        force=order.force,
        resume=order.resume,
        track=options.track,
        tracking_uri=options.tracking_uri,
    )

    def look(watch: Watch) -> tuple[Subject, Settings | None]:
        watch.step("Reading network, weights and data")
        subject, settings = _read_and_check(options, methods)
        watch.end()
        if subject.random and order.prepare is None:
            screen.warn("no --weights: the network has random ones, so that only its costs mean something.")
        if doubt := _doubt(methods):
            screen.warn(doubt)
        return subject, settings

    return run_errand(errand, screen, look, partial(_work, order, methods))


def _doubt(methods: Methods) -> str | None:
    """Why what was asked for may give poor sizes, though it can be done."""
    if not methods.allocator.adds or methods.criterion.additive:
        return None
    criterion, allocator = named(CRITERIA, methods.criterion), named(ALLOCATORS, methods.allocator)
    return (
        f"allocator {allocator!r} adds up losses, which the scores of {criterion!r} are not: its sizes may be "
        "poor. Take `--criterion obs`, or `--allocator global`."
    )


def _certificate(options: PruneOptions, plan: Plan) -> list[str]:
    """How far the assumption of an allocator that adds up losses was seen to hold."""
    additivity = plan.made_by.get("additivity")
    if additivity is None or not ALLOCATORS[options.allocator].adds:
        return []
    return [
        f"{options.allocator!r} takes losses of axes to add up; over sets of axes they did with R2 {additivity:.2f}"
    ]


def keep(told: Mapping[str, Any], folder: Path) -> None:
    """Write the answer of a command beside its result."""
    write_atomically(folder / OUTCOME, json.dumps(finite(told), indent=1, allow_nan=False).encode())


def finish(answer: dict[str, Any], screen: Screen, drawn: Callable[[Mapping[str, Any], "Console"], None] = draw) -> int:
    """Show the answer, and say with the exit code whether every gate was passed."""
    screen.show(answer, lambda console: drawn(answer, console))
    failed = gates_failed(answer)
    if not failed:
        return 0
    files = answer["files"].get("folder", "the folder")
    screen.say(f"gate failed: {', '.join(failed)}. The result lies in {files} all the same; do not deploy it unseen.")
    return GateError.exit_code


def command_line(options: PruneOptions, folder: Path) -> str:
    """The command that does all this again."""
    words = ["metaprune", "prune"]
    for key, value in options.model_dump(mode="json", exclude_defaults=True, exclude={"out"}).items():
        flag = f"--{key.replace('_', '-')}"
        if key in ("rules", "freeze", "only"):
            words += [part for given in value for part in (flag, given)]
        elif key == "model_args":
            words += [part for name, given in value.items() for part in ("--model-arg", f"{name}={_plain(given)}")]
        elif key == "set":
            words += [part for name, given in value.items() for part in ("--set", f"{name}={spelt(given)}")]
        elif isinstance(value, dict):
            words += [flag, ",".join(f"{name}={given}" for name, given in value.items())]
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list):
            words += [flag, ",".join(map(str, value))]
        else:
            words += [flag, without_password(value) if key == "tracking_uri" else str(value)]
    return shlex.join([*words, "--out", str(folder)])


def _plain(value: Any) -> str:
    """As `--model-arg` reads it back: JSON, but a text as it is where JSON would not take it for something else."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except json.JSONDecodeError:
            return value
    return json.dumps(value)


def _read_and_check(options: PruneOptions, methods: Methods) -> tuple[Subject, Settings | None]:
    """Everything that can be wrong with the options, found before anything is written."""
    device = torch_device(options.accelerator)
    if options.budget:
        parse_budget(options.budget)
    device_profile = None if options.device is None else load_device(options.device)
    _check_needs(options, methods)
    _check_metanet(options, methods)
    sparse = entry_budget(options.budget, options.pattern)
    if sparse:
        _check_sparse(options, methods)
    subject = read_subject(
        options.model,
        weights=options.weights,
        data=options.data,
        input_shape=options.input_shape,
        model_args=options.model_args,
        rules=options.rules,
        classifies=options.task in (None, CLASSIFICATION),
        seed=options.seed,
    )
    task = resolve_task(options.task, subject.module)
    network = trace(subject.module, subject.source.example_inputs, freeze=options.freeze, only=options.only)
    if options.budget:
        network = with_times(network, options.budget)
    settings = None

    def reach(budget: str, round_to: RoundTo) -> None:
        if sparse:
            shares = {"floor": options.floor, "ceiling": options.ceiling}
            entries, _ = reachable_entries(network, sparse, options.pattern, **shares)
            methods.allocator.check_units(entries)
            return
        reachable_limits(network, budget, floor=options.floor, round_to=round_to, ceiling=options.ceiling)

    if device_profile is None:
        reach(options.budget, options.round_to or 1)
    else:
        settings = settings_for(device_profile, network, options.budget, options.round_to, reach=reach)
    data = subject.dataset
    context = Context(
        train=None if data is None else data.train,
        calibration=None if data is None else calibration_batches(data, options.calibration, options.seed),
        task=task,
        dense=subject.module,
        device=device,
        seed=options.seed,
    )
    for recovery in methods.recoveries:
        recovery.check(subject.module, context)
    return subject, settings


def _check_training(options: PruneOptions) -> None:
    """Whether there is anything to train on."""
    if options.data is None and options.training:
        name = next(iter(options.training))
        raise ConfigError(f"`--{name.replace('_', '-')}` is for training, which needs data. Give --data.")


def _check_needs(options: PruneOptions, methods: Methods) -> None:
    """What is useless or impossible without data."""
    if options.data is not None:
        return
    if methods.criterion.needs:
        raise ConfigError(
            f"criterion {named(CRITERIA, methods.criterion)!r} needs data, but none was given. Give --data, or a "
            f"criterion that reads weights alone: {', '.join(name for name in CRITERIA if not CRITERIA[name].needs)}."
        )
    if methods.allocator.needs:
        raise ConfigError(
            f"allocator {options.allocator!r} needs data, but none was given. Give --data, or an allocator that needs "
            f"none: {', '.join(name for name in ALLOCATORS if not ALLOCATORS[name].needs)}."
        )
    if options.recovery not in (None, "none"):
        raise ConfigError(
            f"recovery {options.recovery!r} needs data, but none was given. Give --data, or --recovery none."
        )


def _check_sparse(options: PruneOptions, methods: Methods) -> None:
    """What single entries that become zero do not go with."""
    units = {"device": options.device, "metanet": options.metanet, "round-to": options.round_to}
    for flag, given in {**units, "rounds": options.rounds > 1}.items():
        if given:
            raise ConfigError(f"`--{flag}` is for units that leave whole, but {options.budget} is of entries. Omit it.")
    require_entrywise(methods.criterion)


def _check_metanet(options: PruneOptions, methods: Methods) -> None:
    """Whether the metanetworks that edit or judge can be read; they are read again when it is their turn."""
    judge, wanted = methods.criterion, [] if options.metanet is None else [options.metanet]
    if isinstance(judge, MetanetScore) and (methods.sets("criterion") or not wanted):
        wanted.append(judge.checkpoint)
    for checkpoint in wanted:
        load_checkpoint(checkpoint)


def _work(
    order: Order, methods: Methods, checked: tuple[Subject, Settings | None], run: Run, tracked: Tracker, watch: Watch
) -> dict[str, Any]:
    began = time.perf_counter()
    subject, settings = checked
    options = order.options
    if settings is not None:
        options = options.model_copy(update={"budget": settings.budget, "round_to": settings.round_to})
    dense = subject.module if order.prepare is None else order.prepare(subject, run, watch)
    result = prune(
        dense,
        subject.source.example_inputs,
        options.budget,
        pattern=options.pattern,
        data=subject.dataset,
        metanet=options.metanet,
        criterion=methods.criterion if methods.sets("criterion") else options.criterion,
        allocator=methods.allocator,
        recovery=methods.recoveries,
        loss=options.task,
        round_to=options.round_to,
        floor=options.floor,
        ceiling=options.ceiling,
        rounds=options.rounds,
        seed=options.seed,
        calibration=options.calibration,
        freeze=options.freeze,
        only=options.only,
        accelerator=options.accelerator,
        folder=run.folder,
        resume=run.resumed,
        progress=watch,
        metrics=tracked.metrics,
        step=watch.step,
    )
    watch.end()
    result.save(run.folder)
    delivery = deliver(result, dense, subject, options, order.folder, watch)
    delivery.time_modules(watch)
    delivery.notes[:0] = [*(settings.notes if settings is not None else ()), *_certificate(options, result.plan)]
    if "entries" in result.plan.made_by:
        delivery.notes.insert(0, "Zeros are stored and multiplied as before: time is won where the runtime skips them.")
    told = outcome(order.command, options, subject, methods.recoveries, result, delivery, tracked)
    told["seconds"] = {**result.seconds, **delivery.seconds, "total": round(time.perf_counter() - began, 3)}
    told["reproduce"] = order.again
    told["next"] = [*order.ideas, *told["next"]]
    delivery.write_report(result, subject, options, methods.recoveries, told)
    keep(told, run.folder)
    if options.track:
        watch.step("Tracking")
        _track(tracked, result, delivery, told, run.folder)
        watch.end()
    return told


def _track(tracked: Tracker, result: Result, delivery: Delivery, told: dict[str, Any], folder: Path) -> None:
    values = {"error_max": result.verification.max_error}
    for side in ("before", "after"):
        figures = told[side]
        values |= {f"{side}/{name}": figures[name] for name in ("macs", "params", "bytes")}
        values |= {f"{side}/{name}": value for name, value in figures["metrics"].items()}
        if figures["latency_ms"] is not None:
            values[f"{side}/latency_ms"] = figures["latency_ms"]
    accuracy = result.after.metrics.get("accuracy")
    if accuracy is not None:
        values |= {"accuracy": accuracy, "accuracy/cut": result.accuracy["cut"].top1}
    if delivery.latency is not None:
        values["latency_ratio"] = delivery.latency.comparisons[0].ratio.value
    tracked.metrics(values)
    for name in ("plan.json", "result.json", OUTCOME, "report.html"):
        tracked.file(folder / name)
    if delivery.exported is not None:
        example = result.network.example_inputs
        sample = {}
        if isinstance(example, torch.Tensor):
            sample = {delivery.exported.inputs[0].name: example[:1].cpu().numpy()}
        tracked.onnx_model(
            delivery.exported.path,
            input_example=sample or None,
            metadata={"budget": told["budget"], "model": told["model"], "macs": told["after"]["macs"]},
        )
