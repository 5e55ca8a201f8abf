"""What came out of a prune: as data for scripts, and as a table for people. The table is drawn from the data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from metaprune.budget import parse_budget
from metaprune.cli.answer import answer
from metaprune.report import numbers

if TYPE_CHECKING:
    from rich.console import Console

    from metaprune.cli.delivery import Delivery
    from metaprune.config import PruneOptions
    from metaprune.graph import Network
    from metaprune.pipeline import Figures, Result
    from metaprune.plans import Plan
    from metaprune.recovery import Recovery
    from metaprune.subject import Subject
    from metaprune.tracking import Tracker

REPORT = "report.html"
PRUNED, DENSE = "model.onnx", "dense.onnx"
DENSE_WEIGHTS = "dense.safetensors"  # of runs that trained the dense network themselves
OUTCOME = "outcome.json"  # the answer of the command, kept beside the result


def plan_told(plan: "Plan", network: "Network") -> dict[str, Any]:
    """How a plan was made, and what it leaves of every axis, as plain data."""
    kept = dict(zip((axis.name for axis in network.axes), network.sizes(plan).tolist(), strict=True))
    axes = [{"name": axis.name, "size": axis.size, "kept": kept[axis.name]} for axis in network.axes if axis.prunable]
    return {"made_by": dict(plan.made_by), "axes": axes}


def outcome(
    command: str,
    options: "PruneOptions",
    subject: "Subject",
    recoveries: "Sequence[Recovery]",
    result: "Result",
    delivery: "Delivery",
    tracked: "Tracker",
) -> dict[str, Any]:
    """Everything that was found out, as plain data."""
    from metaprune.tracking import without_password

    split = result.accuracy.get("dense")
    folder = delivery.folder
    names = (PRUNED, DENSE, "model.safetensors", DENSE_WEIGHTS, "example.safetensors", "plan.json", "result.json")
    files = {name: str(folder / name) for name in names if (folder / name).exists()}
    latency = delivery.latency
    medians = (None, None) if latency is None else tuple(arm.p50.value for arm in latency.arms)
    return answer(
        command,
        model=subject.source.spec,
        weights=options.weights,
        data=options.data,
        split=None if split is None else split.split,
        images=None if split is None else split.n,
        before=_figures(result.before, medians[0]),
        after=_figures(result.after, medians[1]),
        budget=str(parse_budget(options.budget)),
        error_max=result.verification.max_error,
        checks=delivery.checks,
        files={"folder": str(folder), **files, REPORT: str(folder / REPORT)},
        seconds={},
        metanet=options.metanet,
        criterion=result.plan.made_by["criterion"],
        allocator=result.plan.made_by["allocator"],
        recovery=[
            {"name": recovery.name, "seconds": done.seconds, "notes": list(done.notes), "history": list(done.history)}
            for recovery, done in zip(recoveries, result.recovered, strict=True)
        ],
        plan=plan_told(result.plan, result.network),
        surgery=dict(result.surgery),
        device=delivery.device,
        accuracy={name: found.to_json() for name, found in result.accuracy.items()},
        difference=None if result.difference is None else result.difference.to_json(),
        latency=None if latency is None else latency.to_json(),
        latency_by_module=_by_module(delivery.times),
        tracking={"run_id": tracked.run_id, "uri": without_password(tracked.uri) or None},
        notes=delivery.notes,
        reproduce="",
        next=_next(options, delivery),
    )


def gates_failed(told: Mapping[str, Any]) -> list[str]:
    """Names of the checks that failed, those of a search that came after it among them."""
    failed = [check["name"] for check in told["checks"] if check["passed"] is False]
    return failed + (gates_failed(told["search"]) if told.get("search") else [])


def draw(told: Mapping[str, Any], console: "Console") -> None:
    """The answer for people, at most 80 columns wide."""
    from rich.table import Table
    from rich.text import Text

    before, after = told["before"], told["after"]
    recovery = "+".join(part["name"] for part in told["recovery"]) or "no recovery"
    console.print()
    console.print(Text.assemble((str(told["model"]), "bold"), f" at {told['budget']}: ", _cut(told), f", {recovery}"))
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    for name in ("", "dense", "pruned"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    table.add_column("", no_wrap=False)
    if told["difference"] is not None:
        change, cut = told["difference"], told["accuracy"]["cut"]
        table.add_row(
            f"accuracy, {told['images']} {told['split']} images",
            numbers.percent(before["metrics"]["accuracy"]),
            Text(numbers.percent(after["metrics"]["accuracy"]), style="bold"),
            numbers.points(change["value"], change["low"], change["high"]),
        )
        if told["recovery"]:
            table.add_row("  directly after the cut", "", numbers.percent(cut["value"]), "")
    for name, quantity, words in (
        ("MACs", "macs", numbers.count),
        ("parameters", "params", numbers.count),
        ("bytes", "bytes", numbers.size),
    ):
        small, dense = after[quantity], before[quantity]
        table.add_row(name, words(dense), words(small), numbers.ratio(small / dense))
    comparison = told["latency"] and told["latency"]["comparisons"][0]
    if comparison:
        ratio = comparison["ratio"]
        table.add_row(
            "latency, batch 1",
            numbers.milliseconds(before["latency_ms"]),
            numbers.milliseconds(after["latency_ms"]),
            numbers.ratio(ratio["value"], ratio["low"], ratio["high"]),
        )
    console.print(table)
    console.print()
    if comparison:
        share = after["macs"] / before["macs"]
        console.print(Text(numbers.in_return(share, comparison["ratio"]["value"], comparison["verdict"])))
    if told["error_max"] is not None:
        console.print(Text(f"The cut network equals the masked one to {told['error_max']:.1e} of the largest output."))
    draw_checks(told["checks"], console)
    for note in told["notes"]:
        console.print(Text.assemble(("note ", "yellow"), note))
    console.print()
    _draw_places(told, console)
    draw_next(told["next"], console)


def draw_next(commands: Sequence[str], console: "Console") -> None:
    """What to try next."""
    from rich.text import Text

    if commands:
        console.print(Text("Next", style="bold"))
    for command in commands:
        console.print(Text(f"  {command}"), soft_wrap=True)  # never broken, so that it can be copied


def draw_checks(checks: Sequence[Mapping[str, Any]], console: "Console") -> None:
    """One line of outcomes, then what was found by those that failed."""
    from rich.text import Text

    line = Text("Checks")
    for passed, (word, style) in OUTCOMES.items():
        names = [check["name"] for check in checks if check["passed"] is passed]
        if names:
            line.append("  " if line.plain == "Checks" else "; ").append(word, style).append(f": {', '.join(names)}")
    console.print(line)
    for check in checks:
        if check["passed"] is False:
            console.print(Text.assemble((f"{check['name']} ", "bold red"), str(check["detail"])))


OUTCOMES = {True: ("ok", "green"), False: ("FAILED", "bold red"), None: ("not made", "dim")}


def _cut(told: Mapping[str, Any]) -> str:
    axes, made_by = told["plan"]["axes"], told["plan"]["made_by"]
    if "entries" in made_by:
        where = "" if made_by["pattern"] == "any" else f" ({made_by['pattern']})"
        stays = f"{made_by['nonzeros']:,} of {made_by['entries']:,} entries of weights stay{where}"
        return f"{stays}, by {told['criterion']}, {told['allocator']}"
    cut = sum(axis["kept"] < axis["size"] for axis in axes)
    learnt = "" if told["metanet"] is None else f"with the metanetwork {told['metanet']}, "
    return f"{learnt}{cut} of {len(axes)} axes cut by {told['criterion']}, {told['allocator']}"


def _draw_places(told: Mapping[str, Any], console: "Console") -> None:
    from rich.text import Text

    files = [name for name in told["files"] if name not in ("folder", REPORT)]
    if REPORT in told["files"]:
        console.print(Text.assemble(("Report  ", "bold"), told["files"][REPORT]), soft_wrap=True)
    console.print(Text.assemble(("Files   ", "bold"), f"{told['files']['folder']}: {', '.join(files)}"))
    if told["tracking"]["run_id"]:
        console.print(Text.assemble(("Tracked ", "bold"), f"MLflow run {told['tracking']['run_id']}"))


def _by_module(times: "tuple[Mapping[str, float], Mapping[str, float]] | None") -> dict[str, Any] | None:
    if times is None:
        return None
    return {"unit": "ms", "label": "measured", "dense": dict(times[0]), "pruned": dict(times[1])}


def _figures(figures: "Figures", latency_ms: float | None) -> dict[str, Any]:
    return {**asdict(figures), "metrics": dict(figures.metrics), "latency_ms": latency_ms}


def _next(options: "PruneOptions", delivery: "Delivery") -> list[str]:
    """Commands that make sense from here."""
    import shlex

    from metaprune.tracking import without_password

    commands = []
    folder = delivery.folder
    if delivery.exported is not None:
        commands.append(shlex.join(["metaprune", "validate", "--run", str(folder)]))
        if (folder / DENSE).exists():
            commands.append(shlex.join(["metaprune", "bench", str(folder / DENSE), str(folder / PRUNED)]))
    else:
        commands.append(shlex.join(["metaprune", "export", "--run", str(folder)]))
    if options.track:
        where = [] if options.tracking_uri is None else ["--tracking-uri", without_password(options.tracking_uri)]
        commands.append(shlex.join(["metaprune", "ui", *where]))
    return commands
