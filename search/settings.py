"""What a campaign is asked for: a YAML file as frozen dataclasses, whose hash is its identity.

Neither torch nor Optuna is imported here; who knows the registered names hands them in.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from metaprune.budget import QUANTITIES, Budget, Limit, parse_budget
from metaprune.config import Recipe, load_recipe, options_of
from metaprune.errors import ConfigError, did_you_mean
from metaprune.search.results import digest

DIRECTIONS = {"accuracy": "maximize", "loss": "minimize", **dict.fromkeys((*QUANTITIES, "latency_ms"), "minimize")}
MEASURED = ("accuracy", "loss", "latency_ms")  # the others are known before anything runs
BASELINES = ("rd", "uniform", "global", "lamp", "erk")
CHOICES = ("criterion", "allocator", "metanet", "recovery", "round_to", "floor")  # beside the budget
METANET = ("off", "edit", "scores", "both")  # who edits the network before the cut, and who judges its units
STEP = 5  # percent, of a range of budgets: so several trials share one, and its baselines
_STRICT = {"extra": "forbid"}


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple | Mapping) else (value,)


def _names(value: Any) -> Any:
    """Texts; YAML reads the word `off` as a falsehood."""
    several = _several(value)
    return several if isinstance(several, Mapping) else tuple("off" if name is False else name for name in several)


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_several)]
Integers = Annotated[tuple[int, ...], BeforeValidator(_several)]


def sign_of(goal: str) -> float:
    """What makes a goal one that is to be small: -1 for those that are to be large."""
    return -1.0 if DIRECTIONS.get(goal) == "maximize" else 1.0


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What the outer study chooses between; the first value of each is what baselines take.

    Args:
        budget: Budgets, e.g. ``[macs=0.5, macs=0.3]``, or one quantity with the ends of a range of shares, e.g.
            ``{macs: [0.3, 0.7]}``.
        criterion: Names of criteria.
        allocator: Names of allocators; those of the baselines are always among them.
        metanet: ``off``, ``edit``, ``scores`` or ``both``.
        recovery: Names of recoveries, several of one way joined by ``+``, or ``none``.
        round_to: Sizes are multiples of this.
        floor: Smallest share of every axis that stays.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _STRICT

    budget: Annotated[tuple[str, ...] | Mapping[str, tuple[float, float]], BeforeValidator(_several)]
    criterion: Names = ("taylor",)
    allocator: Names = ("rd", "global", "uniform")
    metanet: Names = ("off",)
    recovery: Names = ("recalibrate_norm",)
    round_to: Integers = (1,)
    floor: Numbers = (0.1,)

    def __post_init__(self) -> None:
        for part in fields(self):
            given = getattr(self, part.name)
            if not given or (not isinstance(given, Mapping) and len(set(given)) < len(given)):
                raise ConfigError(f"`{part.name}` must hold different values, at least one, but holds {given!r}.")
        if isinstance(self.budget, Mapping):
            _check_range(self.budget)
        for text in self.budgets:
            parse_budget(text)
        for mode in self.metanet:
            if mode not in METANET:
                raise ConfigError(
                    f"`metanet` must be among {', '.join(METANET)}, but holds {mode!r}.{did_you_mean(mode, METANET)}"
                )
        if min(self.round_to) < 1 or not all(0 <= floor <= 1 for floor in self.floor):
            raise ConfigError(f"`round_to >= 1`, `0 <= floor <= 1` must hold, but are {self.round_to}, {self.floor}.")

    @property
    def budgets(self) -> tuple[str, ...]:
        """Every budget, or both ends and the middle of the range."""
        if not isinstance(self.budget, Mapping):
            return self.budget
        ((quantity, (low, high)),) = self.budget.items()
        first, last = round(low * 100), round(high * 100)
        middle = first + (last - first) // (2 * STEP) * STEP
        return tuple(f"{quantity}={percent / 100:g}" for percent in dict.fromkeys((last, middle, first)))


def _check_range(budget: Mapping[str, tuple[float, float]]) -> None:
    for quantity, (low, high) in budget.items():
        known = (*QUANTITIES, "latency")
        if len(budget) > 1 or quantity not in known or not 0 < low < high <= 1:
            raise ConfigError(
                f"a range of budgets must be one of {', '.join(known)} with two shares up to 1, the lower one first, "
                f"but it is {dict(budget)!r}.{did_you_mean(quantity, known)}"
            )
        steps = (low * 100 / STEP, high * 100 / STEP)
        if any(abs(step - round(step)) > 1e-9 for step in steps):
            raise ConfigError(f"the ends of a range of budgets must be multiples of {STEP} %, but are {low}, {high}.")


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One fidelity, and who may climb to it.

    Args:
        kind: ``curves`` predicts the loss from curves, ``evaluate`` heals by the recovery of the trial and measures,
            ``finetune`` trains before it measures.
        top: So many of the rung below climb up, baselines beside them.
        share: Instead of `top`: such a part of them.
        images: Validation images to measure on; None takes all.
        criterion: Whose curves predict, so that trials of all criteria can be compared.
        epochs: Of fine-tuning.
        lr: Highest learning rate.
        batch_size: Images of a step.
        distil: Weight of the dense network as a teacher, 0 to 1.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _STRICT

    kind: Literal["curves", "evaluate", "finetune"]
    top: int | None = None
    share: float | None = None
    images: int | None = None
    criterion: str = "taylor"
    epochs: int = 1
    lr: float = 0.01
    batch_size: int = 128
    distil: float = 0.0

    def __post_init__(self) -> None:
        if self.top is not None and self.share is not None:
            raise ConfigError(f"a rung has `top` or `share`, but this one has both, {self.top} and {self.share}.")
        least = {"top": self.top, "images": self.images, "epochs": self.epochs, "batch_size": self.batch_size}
        for name, value in least.items():
            if value is not None and value < 1:
                raise ConfigError(f"`{name} >= 1` must hold for a rung, but {name}={value}.")
        if not (self.share is None or 0 < self.share <= 1) or not 0 <= self.distil <= 1 or not self.lr > 0:
            raise ConfigError(
                f"`0 < share <= 1`, `0 <= distil <= 1`, `lr > 0` must hold for a rung, but they are {self.share}, "
                f"{self.distil}, {self.lr}."
            )

    def climbing(self, candidates: int) -> int:
        """How many of so many trials climb to this rung."""
        return self.top if self.top is not None else math.ceil((self.share or 0.25) * candidates)


@dataclass(frozen=True, kw_only=True)
class SpaceOptions:
    """What may be cut.

    Args:
        freeze: Modules that must stay: patterns of paths, or classes.
        only: Modules that alone may be cut.
        grid: Sizes of an axis are multiples of this share of it; None allows every size.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _STRICT

    freeze: Names = ()
    only: Names = ()
    grid: float | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and not 0 < self.grid <= 0.5:
            raise ConfigError(f"`0 < grid <= 0.5` must hold, but grid={self.grid}.")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the dense network is trained first, where there are no weights of it.

    Args:
        epochs: Passes over the training images.
        lr: Highest learning rate.
        batch_size: Images of a step.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _STRICT

    epochs: int = 20
    lr: float = 0.1
    batch_size: int = 64


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When the first rung ends; what has climbed by then is brought to its end.

    Args:
        trials: So many different trials, baselines among them.
        evaluations: So many evaluations on all rungs; rungs above get what is left.
        seconds: No trial is begun later after a start, or after a resumption.
        plateau: The front has not changed for so many trials.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = _STRICT

    trials: int = 100
    evaluations: int | None = None
    seconds: float | None = None
    plateau: int | None = None

    def __post_init__(self) -> None:
        for part in fields(self):
            value = getattr(self, part.name)
            if value is not None and value < 1:
                raise ConfigError(f"`{part.name} >= 1` must hold for `stop`, but {part.name}={value}.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A campaign.

    Args:
        name: What it is called in the storage and in MLflow.
        model: What :func:`metaprune.zoo.resolve_model` takes.
        data: What :func:`metaprune.data.load` takes.
        choices: What is chosen between.
        weights: File of its weights.
        model_args: Options of the network's factory.
        rules: Modules to import for their rules of the user's ops.
        task: A registered name or ``package.module:factory``; None means classification.
        train: How the dense network is trained first; None where it has weights.
        space: What may be cut.
        set: Options of the methods that are chosen between, e.g. ``{criterion.samples: 256}`` for every criterion that
            has it, or ``{recovery.perp.rank: 8}`` for one method; the fine-tuning of rungs has its own.
        limits: What must hold of every network, e.g. ``macs=0.6,latency_ms=0.8``.
        objectives: One to three of accuracy, loss, macs, params, bytes, activations, latency_ms.
        rungs: Fidelities, the cheapest first; the study works on the first one.
        sampler: ``tpe``, ``gp``, ``nsga2`` or ``random``.
        baselines: Allocators that are tried first at every budget; `rd`, `uniform` and `global` among them climb beside
            what climbs.
        stop: When it ends.
        calibration: Training images that criteria and recoveries look at.
        seed: Decides every random number.
        accelerator: ``auto``, ``cpu`` or ``cuda``.
        storage: Address of a database or proxy; None for a journal in the folder.
        lease: Seconds after which a worker of another machine that was not heard of counts as dead.
        workers: Processes that work here; 0 leaves all work to others.
        children: At most so many runs in MLflow.
        networks: At most so many networks of the front are written, exported and checked.
    """

    name: str
    model: str
    data: str
    choices: Choices
    weights: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    rules: Names = ()
    task: str | None = None
    train: Training | None = None
    space: SpaceOptions = SpaceOptions()
    set: Mapping[str, Any] = field(default_factory=dict)
    limits: str | None = None
    objectives: Names = ("accuracy", "macs")
    rungs: tuple[Rung, ...] = (Rung(kind="evaluate"),)
    sampler: Literal["tpe", "gp", "nsga2", "random"] = "tpe"
    baselines: Names = BASELINES
    stop: Stop = Stop()
    calibration: int = 512
    seed: int = 0
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    storage: str | None = None
    lease: float = 30.0
    workers: int = 1
    children: int = 100
    networks: int = 20

    def __post_init__(self) -> None:
        if not 1 <= len(self.objectives) <= 3 or len(set(self.objectives)) < len(self.objectives):
            raise ConfigError(f"`objectives` must be one to three different ones, but are {list(self.objectives)!r}.")
        for name in self.objectives:
            if name not in DIRECTIONS:
                raise ConfigError(
                    f"every objective must have an evaluator, but {name!r} has none.{did_you_mean(name, DIRECTIONS)} "
                    f"Known: {', '.join(DIRECTIONS)}."
                )
        if not self.rungs:
            raise ConfigError("`rungs` must hold at least one fidelity, but it is empty.")
        for name, least in (("calibration", 1), ("seed", 0), ("lease", 1), ("workers", 0), ("networks", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"`{name} >= {least}` must hold, but {name}={getattr(self, name)}.")
        if not 1 <= self.children <= 100:
            raise ConfigError(f"`1 <= children <= 100` must hold, but children={self.children}.")
        _ = self.analytic, self.measured  # refuses what is no limit

    @property
    def analytic(self) -> Budget | None:
        """Limits on costs that are known before anything runs."""
        parts = [part for part in self._limits() if part.partition("=")[0].strip() in QUANTITIES]
        return parse_budget(",".join(parts)) if parts else None

    @property
    def measured(self) -> dict[str, float]:
        """Limits on what is measured: accuracy from below, the others from above."""
        found = {}
        for part in self._limits():
            name, _, number = (word.strip() for word in part.partition("="))
            if name in QUANTITIES:
                continue
            known = (*QUANTITIES, *MEASURED)
            try:
                found[name] = float(number)
            except ValueError:
                found[name] = math.nan
            most = 100.0 if name == "accuracy" else math.inf
            if name not in MEASURED or not 0 < found[name] <= most or math.isinf(found[name]):
                raise ConfigError(
                    f"a limit must be quantity=number, in one of {', '.join(known)}, but {part!r} is not."
                    f"{did_you_mean(name, known)}"
                )
        return found

    def _limits(self) -> list[str]:
        return [part for part in (self.limits or "").split(",") if part.strip()]

    def budget(self, target: str) -> Budget:
        """What an allocator must meet: the target of a trial, and the limits of the campaign."""
        limits: tuple[Limit, ...] = parse_budget(target).limits
        return Budget(limits + (() if self.analytic is None else self.analytic.limits))

    @property
    def deciding(self) -> dict[str, Any]:
        """All that decides what a trial gives, as plain data."""
        places = ("storage", "lease", "workers", "children", "networks", "stop", "name")
        unset = () if self.set else ("set",)  # so that a campaign without it is the one that it was
        return {name: value for name, value in asdict(self).items() if name not in (*places, *unset)}

    @property
    def identity(self) -> str:
        """Hash of `deciding`, but for where weights and data lie: these are known by what is in them."""
        return digest({name: value for name, value in self.deciding.items() if name not in ("weights", "data")})

    def fidelity(self, number: int) -> str:
        """Name of a rung, in its study and among results."""
        return f"{number}-{self.rungs[number].kind}"


_SECTIONS: dict[str, type[Any]] = {"choices": Choices, "space": SpaceOptions, "train": Training, "stop": Stop}
KEYS = tuple(part.name for part in fields(Settings))


def read_settings(path: str | Path, names: Mapping[str, Collection[str]] | None = None, **given: Any) -> Settings:
    """The campaign that a YAML file describes.

    Args:
        path: The file, or the name of one that ships, e.g. ``search/digits``.
        names: Legal values of the choices ``criterion``, ``allocator`` and ``recovery``; None checks none.
        **given: Keys that go over what is written; None leaves what is written.

    Raises:
        InputError: There is no such file, or it cannot be read.
        ConfigError: A key or a value does not fit; file and line are named.
    """
    written = load_recipe(path, "search", KEYS)
    parts: dict[str, Any] = {"name": Path(path).stem, **written.values}
    for key, kind in _SECTIONS.items():
        if written.values.get(key) is not None:
            parts[key] = options_of(kind, {}, written.section(key, [part.name for part in fields(kind)]))
        else:
            parts.pop(key, None)
    stop = given.pop("stop", None) or {}
    if stop:
        parts["stop"] = Stop(**{**asdict(parts.get("stop", Stop())), **stop})
    settings = options_of(Settings, given, Recipe(written.path, parts, written.lines))
    _check_names(settings, written, names or {})
    return settings


def _check_names(settings: Settings, written: Recipe, names: Mapping[str, Collection[str]]) -> None:
    given = [(f"choices.{key}", key, getattr(settings.choices, key)) for key in ("criterion", "allocator", "recovery")]
    given.append(("baselines", "allocator", settings.baselines))
    for place, key, values in given:
        for name in (part for value in values for part in value.split("+")):
            if key in names and name not in (*names[key], *(("none",) if key == "recovery" else ())):
                raise ConfigError(
                    f"{written.where(place)} must hold registered names, but has {name!r}."
                    f"{did_you_mean(name, names[key])} Known: {', '.join(sorted(names[key]))}."
                )
