"""``metaprune prune --stream``: weights cut from file to file; the network is neither held nor run."""

import json
import time
from dataclasses import asdict
from typing import Any

from metaprune.budget import entry_budget, parse_budget
from metaprune.cli.answer import answer
from metaprune.cli.course import Order
from metaprune.cli.failure import Interrupted
from metaprune.cli.methods import read_methods
from metaprune.cli.screen import Screen
from metaprune.cli.summary import OUTCOME, plan_told
from metaprune.config import PruneOptions
from metaprune.errors import ConfigError
from metaprune.factory import import_rules
from metaprune.files import write_atomically
from metaprune.run import Run, check, seed_everything
from metaprune.stream import Streamed, choose, parameters_on_meta
from metaprune.zoo import SourceModel, resolve_model


def stream_out(order: Order, screen: Screen) -> dict[str, Any]:
    """Do it.

    Returns:
        What the command answers.

    Raises:
        MetapruneError: Something does not fit; nothing was written, unless weights turn out not to be finite.
        Interrupted: The user pressed Ctrl-C.
    """
    options = order.options
    weights = _check_options(options)
    methods = read_methods(options, order.where)
    options = options.model_copy(update={"set": methods.options})
    check(order.folder, order.command, options.deciding, force=order.force, resume=order.resume)
    began, kept = time.perf_counter(), False
    try:
        with screen.watch() as watch:
            watch.step("Reading the network")
            seed_everything(options.seed)
            import_rules(options.rules)
            with parameters_on_meta():
                source = resolve_model(options.model, input_shape=options.input_shape, options=options.model_args)
            chosen = choose(
                source.module.eval(),
                source.example_inputs,
                weights,
                options.budget,
                criterion=methods.criterion,
                allocator=methods.allocator,
                round_to=options.round_to,
                floor=options.floor,
                ceiling=options.ceiling,
                rounds=options.rounds,
                seed=options.seed,
                freeze=options.freeze,
                only=options.only,
                step=watch.step,
            )
            with Run.open(
                order.folder, order.command, options.deciding, force=order.force, resume=order.resume
            ) as run:  # fmt: skip
                kept = True
                told = _outcome(order, source, chosen.write(run.folder, step=watch.step))
                told["seconds"]["total"] = round(time.perf_counter() - began, 3)
                write_atomically(run.path(OUTCOME), json.dumps(told, indent=1, allow_nan=False).encode())
            watch.end()
    except KeyboardInterrupt:
        raise Interrupted(f"{order.again}{' --resume' if kept else ''}", kept=kept) from None
    return told


def _check_options(options: PruneOptions) -> str:
    """The weights; refuses what needs the network to run."""
    running = {"data": options.data, "task": options.task, **options.training}
    if options.recovery not in (None, "none"):
        running["recovery"] = options.recovery
    for name, value in running.items():
        if value is not None:
            raise ConfigError(
                f"`--{name.replace('_', '-')}` needs a network that runs, but `--stream` never holds it. Leave out one "
                "of them."
            )
    if options.metanet is not None:
        raise ConfigError(
            "`--metanet` reads and changes all weights together, but `--stream` holds one tensor at a time. Leave out "
            "one of them."
        )
    if options.device is not None:
        raise ConfigError(
            "`--device` is for networks that are exported and run, but `--stream` never holds one. Leave out one of "
            "them."
        )
    if entry_budget(options.budget, options.pattern):
        raise ConfigError(f"`--stream` cuts units from file to file, but {options.budget} is of entries. Omit it.")
    if options.weights is None:
        raise ConfigError("`--stream` cuts weights from file to file. Give them: --weights FILE or FOLDER.")
    return options.weights


def _outcome(order: Order, source: SourceModel, done: Streamed) -> dict[str, Any]:
    detail = "the cut network makes the calls of the dense one with the predicted sizes; it was not run."
    return answer(
        order.command,
        model=source.spec,
        weights=order.options.weights,
        before={**asdict(done.before), "metrics": {}},
        after={**asdict(done.after), "metrics": {}},
        budget=str(parse_budget(order.options.budget)),
        checks=[{"name": "calls", "passed": True, "detail": detail}],
        files={"folder": str(order.folder), **{file.name: str(order.folder / file.name) for file in done.files}},
        seconds=dict(done.seconds),
        metanet=None,
        criterion=done.plan.made_by["criterion"],
        allocator=done.plan.made_by["allocator"],
        recovery=[],
        plan=plan_told(done.plan, done.network),
        surgery=done.cut.to_json(),
        device=None,
        accuracy={},
        difference=None,
        latency=None,
        latency_by_module=None,
        tracking={"run_id": None, "uri": None},
        notes=[],
        reproduce=order.again,
        next=[],
    )
