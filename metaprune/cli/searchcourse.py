"""The course of `metaprune search`: check everything, fill a folder, work with others, tell what was found."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from metaprune.allocate import ALLOCATORS
from metaprune.cli.answer import answer
from metaprune.cli.course import finish
from metaprune.cli.failure import Interrupted
from metaprune.cli.screen import Screen, Watch, finite
from metaprune.cli.searchboard import Board, draw_end, draw_space, draw_status
from metaprune.cli.searchfront import FRONT, files_of, tested, write_networks
from metaprune.cli.summary import REPORT
from metaprune.criteria import CRITERIA
from metaprune.errors import ConfigError, InputError, ResourceError
from metaprune.files import read_json, write_atomically
from metaprune.recovery import RECOVERIES
from metaprune.report import CampaignFindings
from metaprune.report.campaign import write as write_page
from metaprune.run import Run, check, locked
from metaprune.search.campaign import Campaign
from metaprune.search.fidelity import Laboratory, check_recoveries
from metaprune.search.pareto import as_csv
from metaprune.search.prepare import read as read_network
from metaprune.search.prepare import train
from metaprune.search.queue import Worker
from metaprune.search.settings import Settings, read_settings
from metaprune.search.space import Space
from metaprune.search.store import open_storage
from metaprune.search.sync import parent
from metaprune.search.sync import write as write_runs
from metaprune.search.worker import work
from metaprune.tracking import Tracker, tracker, without_password

COMMAND = "search run"
SETTINGS, PARETO, TABLE = "settings.json", "pareto.json", "pareto.csv"
WHAT = {
    FRONT: "the networks of the front: plan, weights, ONNX",
    PARETO: "all that was found, as data",
    TABLE: "the same as a table",
    SETTINGS: "what was asked for",
    "journal.log": "every trial, for Optuna",
    "results": "what each evaluation found",
}
STORAGE = "METAPRUNE_STORAGE"  # so that no password has to be written down
BOUND = "METAPRUNE_BOUND"  # a worker that ends with the process that started it
_PATIENCE_S = 60.0  # with workers of our own that have nothing left to do


@dataclass(frozen=True, kw_only=True)
class Order:
    """What goes over the config.

    Args:
        workers: Processes on this machine.
        storage: Address of the storage.
        trials: Of the first rung.
        seconds: After which none begins.
        track: Keep it in MLflow.
        tracking_uri: In this store.
        as_json: Print one JSON object.
    """

    workers: int | None = None
    storage: str | None = None
    trials: int | None = None
    seconds: float | None = None
    track: bool = True
    tracking_uri: str | None = None
    as_json: bool = False

    @property
    def stop(self) -> dict[str, Any]:
        """What of it says when to stop."""
        given = {"trials": self.trials, "seconds": self.seconds}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def again(self) -> list[str]:
        """What of it a command that goes on must be given once more."""
        where = ["--tracking-uri", without_password(self.tracking_uri)] if self.tracking_uri else []
        return where if self.track else ["--no-track"]


def show_space(config: str, as_json: bool) -> int:
    """`metaprune search space`."""
    settings, screen = _read(config), Screen(as_json)
    with screen.watch() as watch:
        watch.step("Reading network and data")
        space, subject = _checked(settings, Path())
    told = answer("search space", model=subject, data=settings.data, **space.to_json())
    screen.show(told, lambda console: draw_space(told, console))
    return 0


def begin(config: str, out: str | None, force: bool, order: Order) -> int:
    """`metaprune search run`."""
    settings = _read(config, workers=order.workers, storage=order.storage, stop=order.stop)
    folder = Path(out) if out else Path("runs") / f"search-{settings.name}"
    screen = Screen(order.as_json)
    return finish(carry_out(settings, folder, order, screen, force=force), screen, draw_end)


def go_on(folder: str, order: Order) -> int:
    """`metaprune search resume`."""
    settings = load_settings(Path(folder))
    changed = {**asdict(settings), "stop": {**asdict(settings.stop), **order.stop}}
    if order.workers is not None:
        changed["workers"] = order.workers
    screen, place = Screen(order.as_json), Path(folder)
    told = carry_out(_settings(changed), place, order, screen, command="search resume", resume=True)
    return finish(told, screen, draw_end)


def show_status(folder: str, as_json: bool) -> int:
    """`metaprune search status`."""
    settings = load_settings(Path(folder))
    campaign = Campaign(settings, open_storage(settings.storage, Path(folder)))
    told = answer("search status", model=settings.model, data=settings.data, **standing(campaign, Path(folder)))
    Screen(as_json).show(told, lambda console: draw_status(told, console))
    return 0


def help_out(folder: str, index: int | None, as_json: bool) -> int:
    """`metaprune search worker`."""
    place, screen = Path(folder), Screen(as_json)
    if os.environ.get(BOUND):
        threading.Thread(target=_end_with_parent, daemon=True).start()
    settings = load_settings(place)
    began = time.perf_counter()
    torch.set_num_threads(1)
    try:
        with _heeding_schedulers(), screen.watch() as watch:
            laboratory = _laboratory(settings, place, watch)
            campaign = Campaign(settings, open_storage(settings.storage, place), Worker.here(), index)
            campaign.check(laboratory.about)
            watch.step("Working")
            done = work(campaign, laboratory, lambda job, how: watch.note(f"trial {job.trial.number}: {how}"))
    except KeyboardInterrupt:
        raise Interrupted(shlex.join(["metaprune", "search", "worker", folder]), kept=True) from None
    told = answer("search worker", model=settings.model, data=settings.data, trials=done)
    told["seconds"] = {"total": round(time.perf_counter() - began, 3)}
    screen.show(told, lambda console: console.print(f"{done} trials were evaluated here."))
    return 0


def synchronise(folder: str, tracking_uri: str | None, as_json: bool) -> int:
    """`metaprune search sync`."""
    place, screen = Path(folder), Screen(as_json)
    settings = load_settings(place)
    campaign = Campaign(settings, open_storage(settings.storage, place))
    tracked = tracker(tracking_uri)
    with screen.watch() as watch:
        watch.step("Opening the tracking store")
        parent(tracked, campaign)
        watch.step("Writing runs and models")
        with tracked:
            write_runs(tracked, campaign, place, files_of(place))
    if tracked.problem:
        screen.warn(tracked.problem)
    told = answer("search sync", model=settings.model, data=settings.data, tracking=_tracking(tracked))
    screen.show(told, lambda console: console.print(f"Tracked as MLflow run {tracked.run_id}"))
    return 0 if tracked.problem is None else ResourceError.exit_code


def write_front(folder: str, bench: bool, as_json: bool) -> int:
    """`metaprune search export`."""
    place, screen = Path(folder), Screen(as_json)
    settings = load_settings(place)
    began = time.perf_counter()
    with screen.watch() as watch, locked(place):
        laboratory = _laboratory(settings, place, watch)
        campaign = Campaign(settings, open_storage(settings.storage, place))
        campaign.check(laboratory.about)
        told = _tell(campaign, laboratory, place, watch, "search export", bench=bench)
    told["seconds"] = {"total": round(time.perf_counter() - began, 3)}
    return finish(told, screen, draw_end)


def load_settings(folder: Path) -> Settings:
    """The settings that a campaign was begun with; METAPRUNE_STORAGE goes over the address of its storage.

    Raises:
        InputError: The folder holds no campaign.
    """
    content = read_json(folder / SETTINGS, "the settings of a campaign")
    if not isinstance(content, dict):
        raise InputError(f"{folder / SETTINGS} must hold the settings of a campaign, but does not.")
    return _settings(content | ({"storage": os.environ[STORAGE]} if os.environ.get(STORAGE) else {}))


def standing(campaign: Campaign, folder: Path) -> dict[str, Any]:
    """Where a campaign stands, as plain data."""
    rungs = []
    for number, queue in enumerate(campaign.queues):
        tasks = list(queue.tasks().values())
        states = ("waiting", "running", "done", "failed", "lost", "quarantined")
        rungs.append(
            {
                "name": campaign.settings.fidelity(number),
                **{state: sum(task.state == state for task in tasks) for state in states},
                "deaths": sum(task.deaths for task in tasks),
                "failures": [
                    {"trial": task.trial.number, "config": campaign.config(task.trial.params), "why": task.failure}
                    for task in tasks
                    if task.state in ("failed", "quarantined")
                ],
            }
        )
    points = campaign.result()
    return {
        "name": campaign.settings.name,
        "objectives": list(campaign.settings.objectives),
        "closed": campaign.closed,
        "over": campaign.over,
        "rungs": rungs,
        "points": len(points),
        "front": [point.row() for point in points if point.front],
        "files": {"folder": str(folder)},
    }


# ---- the whole way ---------------------------------------------------------------------------------------------------


def carry_out(
    settings: Settings, folder: Path, order: Order, screen: Screen, *, command: str = COMMAND, force: bool = False,
    resume: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The whole way, for `metaprune search run` and for whoever has a network and a folder.

    Args:
        settings: What is searched.
        folder: Where the files go.
        order: How it is tracked.
        screen: Shows a live table.
        command: The verb.
        force: Delete what an earlier run left in the folder.
        resume: Go on with it.

    Returns:
        What the command answers.

    Raises:
        MetapruneError: Something does not fit (nothing was written), or failed on the way (what was done is kept).
        Interrupted: The user pressed Ctrl-C.
    """
    began = time.perf_counter()
    again = shlex.join(["metaprune", "search", "resume", str(folder), *order.again])
    options = {**settings.deciding, "name": settings.name, "weights": None}  # they are known by what is in them
    if (folder / SETTINGS).exists() and not (force or resume):
        raise ConfigError(
            f"{folder} holds a campaign. Go on with `{again}`, give --force to delete it, or another --out."
        )
    check(folder, COMMAND, options, force=force, resume=resume)
    kept = False
    try:
        with _heeding_schedulers(), screen.watch() as watch, ExitStack() as stack:
            tracked = tracker(order.tracking_uri, order.track)
            watch.step("Reading network and data")
            _checked(settings, folder)
            if settings.storage is not None:
                open_storage(settings.storage, folder)  # refused now, or never
            run = stack.enter_context(Run.open(folder, COMMAND, options, force=force, resume=resume))
            write_atomically(run.path(SETTINGS), json.dumps(_saved(settings), indent=1).encode())
            kept = True
            if force and settings.storage is not None:
                Campaign.forget(settings, open_storage(settings.storage, folder))
            laboratory = _laboratory(settings, folder, watch)
            campaign = Campaign.begin(settings, open_storage(settings.storage, folder), laboratory.about, index=0)
            if order.track:
                watch.step("Opening the tracking store")
                parent(tracked, campaign)
                stack.enter_context(tracked)
            watch.step("Measuring the dense network")
            laboratory.dense()
            watch.end()
            if settings.workers > 0:
                with _workers(folder, settings), Board(screen, _other(settings, folder)) as board:
                    work(campaign, laboratory, board.told)
            told = _tell(campaign, laboratory, folder, watch, command)
            if order.track:
                watch.step("Tracking")
                write_runs(tracked, campaign, folder, files_of(folder))
                watch.end()
            told |= {"tracking": _tracking(tracked), "reproduce": again}
            told["seconds"] = {"total": round(time.perf_counter() - began, 3)}
    except KeyboardInterrupt:
        raise Interrupted(again if kept else shlex.join(["metaprune", *sys.argv[1:]]), kept=kept) from None
    if tracked.problem:
        screen.warn(
            f"{tracked.problem}. Later: {shlex.join(['metaprune', 'search', 'sync', str(folder), *order.again])}"
        )
    return told


def _tell(
    campaign: Campaign, laboratory: Laboratory, folder: Path, watch: Watch, command: str, *, bench: bool = False
) -> dict[str, Any]:
    """What was found, and the files that say so."""
    settings, points = campaign.settings, campaign.result()
    networks = write_networks(campaign, laboratory, folder, watch, bench=bench)
    found = {
        **standing(campaign, folder),
        "dense": laboratory.dense()["metrics"],
        "split": laboratory.data.validation.name,
        "images": len(laboratory.data.validation),
        "networks": networks,
    }
    rows = [{**asdict(point), "config": dict(point.config)} for point in points]
    content = {**found, "identity": settings.identity, "evaluated": rows}
    del content["files"]  # paths of this machine
    write_atomically(folder / PARETO, json.dumps(finite(content), indent=1, allow_nan=False).encode())
    write_atomically(folder / TABLE, as_csv(points, {network["key"]: tested(network) for network in networks}).encode())
    told = answer(command, model=laboratory.subject.source.spec, data=settings.data) | found
    told["checks"] = [check for network in networks for check in network["checks"]]
    told["error_max"] = max((network["error_max"] for network in networks), default=None)
    told["files"] = {"folder": str(folder), **{name: str(folder / name) for name in (PARETO, TABLE, REPORT)}}
    told["reproduce"] = shlex.join(["metaprune", "search", "resume", str(folder)])
    write_page(
        CampaignFindings(
            name=settings.name,
            model=told["model"],
            data=settings.data,
            split=found["split"],
            images=found["images"],
            objectives=settings.objectives,
            dense=found["dense"],
            sizes=laboratory.dense()["sizes"],
            closed=campaign.closed,
            first=campaign.points(0),
            last=points,
            failures=[failure for rung in found["rungs"] for failure in rung["failures"]],
            networks={network["key"]: network for network in networks},
            commands=[told["reproduce"], shlex.join(["metaprune", "search", "export", str(folder), "--bench"])],
            files={name: what for name, what in WHAT.items() if (folder / name).exists()},
        ),
        folder / REPORT,
    )
    return told


def _tracking(tracked: Tracker) -> dict[str, Any]:
    return {"run_id": tracked.run_id, "uri": without_password(tracked.uri) or None}


def _read(config: str, **given: Any) -> Settings:
    names = {"criterion": tuple(CRITERIA), "allocator": tuple(ALLOCATORS), "recovery": tuple(RECOVERIES)}
    return read_settings(config, names, **given)


def _saved(settings: Settings) -> dict[str, Any]:
    """The settings for other processes, wherever they run, and without a password."""
    storage = None if settings.storage is None else without_password(settings.storage)
    weights = None if settings.weights is None else str(Path(settings.weights).absolute())
    return {**asdict(settings), "storage": storage, "weights": weights}


def _settings(content: dict[str, Any]) -> Settings:
    return TypeAdapter(Settings).validate_python(content)


def _checked(settings: Settings, folder: Path) -> tuple[Space, str]:
    """Everything that can be wrong, found before anything is written."""
    subject = read_network(settings)
    laboratory = Laboratory(settings, subject, folder)
    check_recoveries(laboratory)
    return Space.of(laboratory.network, settings), subject.source.spec


def _laboratory(settings: Settings, folder: Path, watch: Watch) -> Laboratory:
    watch.step("Reading network and data")
    subject = read_network(settings)
    if settings.train is not None:
        watch.step("Training the network that is to be pruned")
        train(settings, subject, folder, watch)
    watch.end()
    return Laboratory(settings, subject, folder)


def _other(settings: Settings, folder: Path) -> Campaign:
    """The same campaign for another thread."""
    return Campaign(settings, open_storage(settings.storage, folder))


@contextmanager
def _heeding_schedulers() -> Iterator[None]:
    """Take SIGTERM, which they send first, for a Ctrl-C: what was begun is given back."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_with_parent() -> None:
    """Wait for the end of the process that holds the other end of our input, then end too."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _workers(folder: Path, settings: Settings) -> Iterator[None]:
    """Further processes that work meanwhile; they end by themselves, or are asked to."""
    command = [sys.executable, "-m", "metaprune.cli", "search", "worker", str(folder), "--json", "--index"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, BOUND: "yes"}
    environment |= {STORAGE: settings.storage} if settings.storage else {}
    with ExitStack() as stack:
        names = [f"worker-{k}.log" for k in range(1, settings.workers)]
        logs = [stack.enter_context((folder / name).open("wb")) for name in names]
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [*command, str(k)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, env=environment
                )
            )
            for k, log in enumerate(logs, 1)
        ]
        try:
            yield
            _wait(processes)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
            _wait(processes)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    until = time.monotonic() + _PATIENCE_S
    for process in processes:
        try:
            process.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
