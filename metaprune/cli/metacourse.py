"""The course of `metatrain`: check everything, train and measure networks, train the metanetwork, say what it is worth.

What is worth keeping lies on disk at once: networks and measurements in the folder of the population, the metanetwork
in checkpoints. Plain criteria are measured on the same networks and images, in the same way, as the control arms.
"""

import json
import shlex
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metaprune.cli.answer import answer
from metaprune.cli.errand import CHECKPOINTS, Errand, run_errand
from metaprune.cli.screen import Screen, Watch, finite
from metaprune.cli.summary import OUTCOME
from metaprune.config import load_recipe, options_of
from metaprune.criteria import CRITERIA, Calibration
from metaprune.data import Dataset, load
from metaprune.errors import ConfigError
from metaprune.files import write_atomically
from metaprune.measure import accuracy
from metaprune.metanet import SHAPES, PaperShape, Shape, new_metanet, save_checkpoint
from metaprune.metatrain import (
    Curve,
    Member,
    MetaTraining,
    Population,
    Recipe,
    Subject,
    Survey,
    Trained,
    curve_of,
    meta_train,
    survey_population,
)
from metaprune.metatrain.loop import check_objectives
from metaprune.metatrain.recipe import KEYS, SECTIONS
from metaprune.metatrain.survey import CALIBRATION, calibration_images
from metaprune.pipeline import timed
from metaprune.report import numbers
from metaprune.run import Run, seed_everything, versions
from metaprune.task import Classification
from metaprune.tracking import Tracker, without_password

if TYPE_CHECKING:
    from rich.console import Console

COMMAND = "metatrain"
METANET = "metanet.safetensors"
OURS = "metanet"
CONTROLS = ("taylor", "l2")
TRACK_EVERY = 10  # steps


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a recipe says.

    Args:
        population: Which networks, trained on what.
        survey: What is measured of them.
        shape: Of the metanetwork.
        training: Of the metanetwork.
    """

    population: Recipe
    survey: Survey
    shape: Shape | PaperShape
    training: MetaTraining

    @property
    def deciding(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        parts = {part.name: asdict(getattr(self, part.name)) for part in fields(self)}
        return {**parts, "seed": self.training.seed}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What one command is to do.

    Args:
        asked: What the recipe says.
        folder: Where the files go.
        population: Where the networks are kept.
        workers: Processes; None takes as many as there are cores.
        accelerator: Where networks are trained.
        track: Keep a run in MLflow.
        tracking_uri: In this store.
        again: The command line, without ``--force`` and ``--resume``.
        force: Delete what an earlier run left in the folder.
        resume: Go on with it.
    """

    asked: Asked
    folder: Path
    population: Path
    workers: int | None
    accelerator: str
    track: bool
    tracking_uri: str | None
    again: str
    force: bool = False
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A network that the metanetwork was chosen on.

    Args:
        member: The network.
        dense: Its accuracy on the validation images that curves are measured on, in percent.
        curves: Of the metanetwork and of the plain criteria, by name.
    """

    member: Member
    dense: float
    curves: Mapping[str, Curve]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        curves = {
            name: {"area": curve.area, "ratios": list(curve.ratios), "accuracies": list(curve.accuracies)}
            for name, curve in self.curves.items()
        }
        return {"name": self.member.name, "family": self.member.family, "dense": self.dense, "curves": curves}


def read_recipe(path: str | Path, *, steps: int | None = None, seed: int | None = None) -> Asked:
    """A recipe of `metaprune metatrain`.

    Args:
        path: A YAML file, or the name of a shipped one.
        steps: Instead of the written ones.
        seed: Likewise.

    Raises:
        InputError: There is no such file, or it cannot be read.
        ConfigError: A key or a value does not fit; file and line are named.
    """
    written = load_recipe(path, COMMAND, (*KEYS, *SECTIONS))

    def section(name: str, kind: type[Any], **flags: Any) -> Any:
        return options_of(kind, flags, written.section(name, [part.name for part in fields(kind)]))

    mode = written.section("shape", [part.name for kind in SHAPES.values() for part in fields(kind)]).values.get("mode")
    return Asked(
        population=Recipe.of(written),
        survey=section("survey", Survey),
        shape=section("shape", SHAPES.get(str(mode), Shape)),
        training=section("training", MetaTraining, steps=steps, seed=seed),
    )


def carry_out(order: Order, screen: Screen) -> dict[str, Any]:
    """Do it.

    Returns:
        What the command answers.

    Raises:
        MetapruneError: Something does not fit (nothing was written), or failed on the way (what was done is kept).
        Interrupted: The user pressed Ctrl-C.
    """
    deciding = order.asked.deciding | {"accelerator": order.accelerator}
    errand = Errand(
        command=COMMAND,
        folder=order.folder,
        deciding=deciding,
        params=deciding,
        again=order.again,
        force=order.force,
        resume=order.resume,
        track=order.track,
        tracking_uri=order.tracking_uri,
    )
    return run_errand(errand, screen, partial(_read_and_check, order), partial(_work, order, screen))


def _read_and_check(order: Order, watch: Watch) -> Dataset:
    """Everything that can be wrong, found before anything is written where it stays."""
    watch.step("Reading data and networks")
    for name in order.asked.shape.reads:
        if CRITERIA[name].together:
            raise ConfigError(f"a metanetwork must read plain criteria, but `shape.reads` has {name!r}. Leave it out.")
    check_objectives(order.asked.shape, order.asked.training.objectives)
    data = load(order.asked.population.data)
    Population.check(order.population, order.asked.population, accelerator=order.accelerator)
    return data


def _work(order: Order, screen: Screen, data: Dataset, run: Run, tracked: Tracker, watch: Watch) -> dict[str, Any]:
    asked, seconds = order.asked, dict[str, float]()
    began = time.perf_counter()
    with timed(seconds, "population", watch.step, "Training the population"):
        population = Population.build(
            order.population, asked.population, workers=order.workers, accelerator=order.accelerator, progress=watch
        )
    train, validation = population.train, _to_choose_on(population)
    with timed(seconds, "survey", watch.step, "Measuring what pruning does to each network"):
        subjects, failed = survey_population(
            order.population,
            [*train, *validation],
            data,
            asked.survey,
            asked.shape.reads,
            workers=order.workers,
            progress=watch,
        )
    watch.end()
    lost = (*population.damaged, *failed)
    for name, why in lost:
        screen.warn(f"{name} is left out: {why}")
    found = {subject.name: subject for subject in subjects}
    taught = [found[member.name] for member in train if member.name in found]
    judges = [member for member in validation if member.name in found]
    with timed(seconds, "training", watch.step, "Training the metanetwork"):
        trained = _train(asked, data, taught, [found[member.name] for member in judges], run, tracked, watch)
    with timed(seconds, "control", watch.step, f"Measuring {' and '.join(CONTROLS)} in its place"):
        judged = [_judged(member, found[member.name], trained, data, asked.training, watch) for member in judges]
    watch.end()
    seconds["total"] = round(time.perf_counter() - began, 3)
    notes = [f"{name} was left out" for name, _ in lost]
    card = _card(order, data, [member for member in train if member.name in found], judged, trained, notes, seconds)
    save_checkpoint(trained.metanet, run.path(METANET), card)
    told = _told(order, card, trained, tracked)
    write_atomically(run.path(OUTCOME), json.dumps(finite(told), indent=1, allow_nan=False).encode())
    if order.track:
        watch.step("Tracking")
        _track(tracked, told, run.folder)
        watch.end()
    return told


def _to_choose_on(population: Population) -> list[Member]:
    """Trained validation networks; what was made of them would count them twice."""
    chosen = [member for member in population.validation if member.kind == "trained"]
    if not chosen:
        raise ConfigError(
            "a metanetwork is chosen on trained networks of the split 'validation', but none of them is usable: "
            f"{'; '.join(f'{name} ({why})' for name, why in population.damaged)}. Repair one, or give more."
        )
    return chosen


def _train(
    asked: Asked,
    data: Dataset,
    train: Sequence[Subject],
    validation: Sequence[Subject],
    run: Run,
    tracked: Tracker,
    watch: Watch,
) -> Trained:
    seed_everything(asked.training.seed)
    return meta_train(
        new_metanet(asked.shape),
        train,
        validation,
        asked.training,
        images=data.validation,
        calibration=calibration_images(data.train, asked.training.calibration),
        batches=data.train,
        folder=run.folder / CHECKPOINTS,
        resume=run.resumed,
        progress=watch,
        metrics=_Means(tracked),
    )


class _Means:
    """Tracks the mean numbers of some steps at once, because a store takes as long as a step, and looks as they are."""

    def __init__(self, tracked: Tracker) -> None:
        self.tracked, self.seen = tracked, list[Mapping[str, float]]()

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        if "loss" not in values:
            self.tracked.metrics(values, step)
            return
        self.seen.append(values)
        if len(self.seen) == TRACK_EVERY:
            self.tracked.metrics({name: float(np.mean([one[name] for one in self.seen])) for name in values}, step)
            self.seen.clear()


def _judged(
    member: Member, subject: Subject, trained: Trained, data: Dataset, training: MetaTraining, watch: Watch
) -> Judged:
    """The metanetwork beside plain criteria, on a network that it did not learn from."""
    network, images = subject.network, training.validation_images(data.validation)
    calibration = Calibration(calibration_images(data.train, CALIBRATION), Classification(), training.seed)

    def curve(name: str) -> Curve:
        scores = CRITERIA[name]().score(network, calibration)
        watch.advance()
        return curve_of(network, lambda share: scores, images, calibration_images(data.train, training.calibration))

    watch.start(len(CONTROLS), "criteria", member.name)
    curves = {OURS: trained.curves[member.name], **{name: curve(name) for name in CONTROLS}}
    watch.close()
    return Judged(member=member, dense=accuracy(network.model, images).top1, curves=curves)


def _card(
    order: Order,
    data: Dataset,
    train: Sequence[Member],
    judged: Sequence[Judged],
    trained: Trained,
    notes: list[str],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """How the metanetwork came about, as plain JSON without a path of this machine."""
    asked = order.asked
    members = [*train, *(one.member for one in judged)]
    families = sorted({member.family for member in members})
    areas = {name: float(np.mean([one.curves[name].area for one in judged])) for name in (OURS, *CONTROLS)}
    best = max(CONTROLS, key=lambda name: areas[name])
    about = (
        f"learnt from {len(train)} networks on {data.name}; mean accuracy of {len(judged)} others at 1.5 to 4 times "
        f"fewer MACs {areas[OURS]:.1f} %, by {best} {areas[best]:.1f} %"
    )
    return {
        "about": about,
        "population": {
            "networks": len(members),
            "families": families,
            "train": [member.name for member in train],
            "validation": [one.member.name for one in judged],
        },
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "survey": asdict(asked.survey),
        "shape": asked.shape.to_json(),
        "training": asdict(asked.training),
        "seed": asked.training.seed,
        "versions": versions(),
        "split": data.validation.name,
        "images": len(asked.training.validation_images(data.validation)),
        "step": trained.step,
        "areas": areas,
        "networks": [one.to_json() for one in judged],
        "history": [{"step": step, "area": area} for step, area in trained.history],
        "rollbacks": list(trained.rollbacks),
        "notes": notes,
        "seconds": dict(seconds),
    }


def _told(order: Order, card: Mapping[str, Any], trained: Trained, tracked: Tracker) -> dict[str, Any]:
    folder = order.folder
    metanet = str(folder / METANET)
    given = ["--model", "SPEC", "--weights", "FILE", "--data", "SPEC", "--budget", "macs=0.5"]
    where = [] if order.tracking_uri is None else ["--tracking-uri", without_password(order.tracking_uri)]
    shared = ("split", "images", "population", "step", "areas", "networks", "history", "rollbacks", "notes", "seconds")
    return answer(
        COMMAND,
        **{key: card[key] for key in shared},
        data=order.asked.population.data,
        checks=[],
        files={"folder": str(folder), METANET: metanet, "population": str(order.population)},
        params=sum(parameter.numel() for parameter in trained.metanet.parameters()),
        tracking={"run_id": tracked.run_id, "uri": without_password(tracked.uri) or None},
        reproduce=order.again,
        next=[
            shlex.join(["metaprune", "prune", "--metanet", metanet, *given]),
            *([shlex.join(["metaprune", "ui", *where])] if order.track else []),
        ],
    )


def _track(tracked: Tracker, told: Mapping[str, Any], folder: Path) -> None:
    tracked.metrics({f"area/{name}": area for name, area in told["areas"].items()}, told["step"])
    tracked.figure("curves.png", _figure(told["networks"]))
    for name in (METANET, OUTCOME):
        tracked.file(folder / name)


def _figure(networks: Sequence[Mapping[str, Any]]) -> Any:
    """Accuracy over speed-up of every validation network, one panel each."""
    from matplotlib.figure import Figure

    columns = min(3, len(networks))
    rows = -(-len(networks) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    for number, network in enumerate(networks, 1):
        panel = figure.add_subplot(rows, columns, number)
        panel.axhline(network["dense"], color="0.6", linestyle=":", label="dense")
        for name, curve in network["curves"].items():
            panel.plot(curve["ratios"], curve["accuracies"], marker="o", markersize=3, label=name)
        panel.set_title(textwrap.fill(network["name"], 48), fontsize=7)
        panel.set_xlabel("times fewer MACs")
        panel.set_ylabel("accuracy, %")
        panel.legend(fontsize=7)
    return figure


def draw(told: Mapping[str, Any], console: "Console") -> None:
    """The answer for people, at most 80 columns wide."""
    from rich.table import Table
    from rich.text import Text

    areas, population = told["areas"], told["population"]
    console.print()
    learnt = len(population["train"])
    console.print(
        Text.assemble(
            ("A metanetwork", "bold"),
            f" of {numbers.count(told['params'])} parameters, taught by {learnt} networks and chosen at step "
            f"{told['step']}. Mean accuracy at 1.5 to 4 times fewer MACs, without training, on {told['images']} "
            f"{told['split']} images, of networks that it did not learn from:",
        )
    )
    console.print()
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    names = ("dense", *areas)
    numeric = sum(max(len(name), 7) + 2 for name in names)  # rich would shrink these columns as much as the names
    table.add_column("", no_wrap=True, overflow="ellipsis", max_width=max(20, console.width - numeric))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, min_width=7)
    for network in told["networks"]:
        found = {name: curve["area"] for name, curve in network["curves"].items()}
        table.add_row(Text(network["name"]), numbers.percent(network["dense"]), *_cells(found))
    if len(told["networks"]) > 1:
        table.add_row(Text("mean", style="bold"), "", *_cells(areas))
    console.print(table)
    console.print()
    console.print(Text(_verdict(areas)))
    for note in told["notes"]:
        console.print(Text.assemble(("note ", "yellow"), note))
    console.print(Text.assemble(("Files   ", "bold"), f"{told['files']['folder']}: {METANET}"))
    if told["tracking"]["run_id"]:
        console.print(Text.assemble(("Tracked ", "bold"), f"MLflow run {told['tracking']['run_id']}"))
    console.print(Text("Next", style="bold"))
    for command in told["next"]:
        console.print(Text(f"  {command}"), soft_wrap=True)  # never broken, so that it can be copied


def _cells(areas: Mapping[str, float]) -> list[Any]:
    from rich.text import Text

    best = max(areas.values())
    return [Text(numbers.percent(area), style="bold" if area == best else "") for area in areas.values()]


def _verdict(areas: Mapping[str, float]) -> str:
    """What the metanetwork gains over the best plain criterion, or loses."""
    best = max(CONTROLS, key=lambda name: areas[name])
    gain = round(areas[OURS] - areas[best], 2)
    if gain == 0:
        return f"It is as good as the best plain criterion, {best}."
    if gain > 0:
        return f"It gains {gain:.2f} points over the best plain criterion, {best}."
    return f"It loses {-gain:.2f} points to the best plain criterion, {best}: prune with that one instead."
