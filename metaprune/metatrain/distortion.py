"""What pruning does to a network's output, measured: the targets of amortised search.

The distortion of a cut network is the mean divergence KL(dense || cut) of its class probabilities on given images, or
the mean squared difference over the mean square of the dense outputs where they are no class scores. BatchNorm
normalises with the statistics of these images, as after its re-estimation. Units leave physically, so nothing is
approximated.

Configurations are of three kinds: one axis loses some of its units, the least valuable or random ones, or two axes do;
all axes lose units together, as an allocation with disturbed scores decides, at a random budget; or searches for a
better allocation try them, each at a budget of its own.

Suffixes: C configurations, U units of all axes, N images.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from metaprune.allocate import Problem
from metaprune.allocate.global_ import Global
from metaprune.edits import Keep
from metaprune.errors import BudgetError, ConfigError, InputError, MetapruneError
from metaprune.files import make_folder, write_atomically
from metaprune.graph import Network
from metaprune.measure import distortion
from metaprune.modes import evaluating
from metaprune.plans import Plan
from metaprune.recovery._checkpoint import digest

SCHEMA = 1
Cut = dict[str, tuple[int, ...]]  # axis name -> ranks of the units that leave


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Which configurations of a network are measured.

    Args:
        images: To measure on, at least 2.
        alone: Configurations in which one axis is cut, in all.
        pairs: Configurations in which two are.
        together: Configurations in which all are.
        searches: Searches for an allocation, at shares of the multiply-accumulates between `least` and `most`, evenly
            spaced in the logarithm.
        moves: Configurations that each tries after its start.
        least: Smallest share of the multiply-accumulates that configurations of all axes leave.
        most: Largest share.
        axis_noise: Standard deviation of the logarithm of what disturbs the scores of an axis.
        unit_noise: Likewise of a unit.
        floor: Smallest share of an axis that stays.
        seed: Draws everything.

    Raises:
        ConfigError: A number is out of range.
    """

    images: int = 256
    alone: int = 100
    pairs: int = 0
    together: int = 200
    searches: int = 0
    moves: int = 16
    least: float = 0.2
    most: float = 0.8
    axis_noise: float = 0.7
    unit_noise: float = 0.3
    floor: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.alone, self.pairs, self.together, self.searches, self.moves)
        if self.images < 2 or min(counts) < 0 or self.configurations < 1:
            raise ConfigError(
                f"`images >= 2`, no negative numbers of configurations and one at least must hold, but they are "
                f"{self.images} and {', '.join(map(str, counts))}."
            )
        if not 0 < self.least <= self.most <= 1:
            raise ConfigError(f"`0 < least <= most <= 1` must hold, but they are {self.least} and {self.most}.")

    @property
    def configurations(self) -> int:
        """How many there are to measure, at most."""
        return self.alone + self.pairs + self.together + self.searches * (1 + self.moves)


@dataclass(frozen=True, eq=False)
class Distortions:
    """What was measured of one network.

    Attributes:
        removed_CU: Which units of which configuration leave, bool; units axis by axis.
        distortion_C: float32.
        share_C: Part of the multiply-accumulates that is left.
        few_C: Only one axis was cut, or two.
        search_C: Number of the search that tried it, int64; -1 where none did.
        reads: Scores of all units by criterion, float64; NaN where it is silent.
    """

    removed_CU: Tensor
    distortion_C: Tensor
    share_C: Tensor
    few_C: Tensor
    search_C: Tensor
    reads: Mapping[str, Tensor]

    def save(self, path: Path) -> Path:
        """Write as one safetensors file."""
        tensors = {name: getattr(self, name) for name in ("removed_CU", "distortion_C", "share_C", "few_C", "search_C")}
        tensors |= {f"reads/{name}": score_U for name, score_U in self.reads.items()}
        make_folder(path.parent)
        write_atomically(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        return path

    @classmethod
    def load(cls, path: Path) -> "Distortions":
        """Read back.

        Raises:
            InputError: The file is missing or damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            reads = {name.partition("/")[2]: tensors.pop(name) for name in list(tensors) if name.startswith("reads/")}
            return cls(**tensors, reads=reads)
        except (OSError, SafetensorError, TypeError) as error:
            raise InputError(f"{path} must hold measured distortions, but cannot be read: {error}.") from error


def measure_distortions(
    network: Network,
    images: Tensor,
    reads: Mapping[str, Tensor],
    survey: Survey,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Distortions:
    """Measure configurations of a network.

    Args:
        network: Traced, with its weights.
        images: Inputs (N, ...).
        reads: From :func:`metaprune.criteria.unit_scores`; the first disturbs and orders the units.
        survey: Which configurations.
        progress: Is told configurations done and in all.

    Raises:
        ConfigError: Nothing may be cut, or there are no scores.
    """
    if not reads:
        raise ConfigError("configurations are drawn around the scores of a criterion, but none is given.")
    base = _by_axis(network, next(iter(reads.values())))
    if not base:
        raise ConfigError("the network must have a prunable axis, but all must stay. `metaprune inspect` says why.")
    random = np.random.default_rng(survey.seed)
    measured = _Measured(network, images, survey, progress)
    for cut in _few(network, base, survey, random, survey.alone, 1):
        measured.add(cut, few=True)
    for cut in _together(network, base, survey, random):
        measured.add(cut)
    for cut in _few(network, base, survey, random, survey.pairs, min(2, len(base))):
        measured.add(cut, few=True)
    for number in range(survey.searches):
        _search(network, base, survey, random, number, measured)
    return measured.all(reads)


class _Measured:
    """Cuts a network, compares, and keeps what came out."""

    def __init__(
        self, network: Network, images: Tensor, survey: Survey, progress: Callable[[int, int], None] | None
    ) -> None:
        self.network, self.images, self.progress = network, images, progress
        self.wanted = self._outputs(network.model)
        self.dense = max(network.cost().macs, 1)
        self.places = {axis.name: start for axis, start in zip(network.axes, _starts(network), strict=True)}
        self.units = sum(axis.size for axis in network.axes)
        self.tried, self.count = 0, survey.configurations
        self.rows: list[Tensor] = []
        self.values: list[tuple[float, float, bool, int]] = []

    def add(self, cut: Cut, *, few: bool = False, search: int = -1) -> float:
        """The distortion of one configuration, kept; infinite, and not kept, where it cannot be measured."""
        self.tried += 1
        if self.progress is not None:
            self.progress(self.tried, self.count)
        plan = plan_of(self.network, cut)
        try:
            value = distortion(self.wanted, self._outputs(self.network.apply(plan)))
        except MetapruneError:  # a size that this network's code does not allow
            return np.inf
        if not np.isfinite(value):
            return np.inf
        row = torch.zeros(self.units, dtype=torch.bool)
        for name, ranks in cut.items():
            row[self.places[name] + torch.tensor(ranks, dtype=torch.int64)] = True
        share = self.network.cost(self.network.sizes(plan)).macs / self.dense
        self.rows.append(row)
        self.values.append((value, share, few, search))
        return value

    def all(self, reads: Mapping[str, Tensor]) -> Distortions:
        """Everything that was kept."""
        if not self.rows:
            raise ConfigError(
                "some configuration must be measurable, but every one was refused. `metaprune inspect` says why."
            )
        values, shares, few, search = zip(*self.values, strict=True)
        return Distortions(
            torch.stack(self.rows),
            torch.tensor(values, dtype=torch.float32),
            torch.tensor(shares, dtype=torch.float32),
            torch.tensor(few),
            torch.tensor(search),
            dict(reads),
        )

    @torch.no_grad()
    def _outputs(self, model: nn.Module) -> Tensor:
        with batch_statistics(model):
            out: Any = model(self.images)
        if not isinstance(out, Tensor):
            out = getattr(out, "logits", out)
        if not isinstance(out, Tensor):
            raise ConfigError(f"a network must return a tensor to be compared, but returns a {type(out).__name__}.")
        return out


def plan_of(network: Network, cut: Cut) -> Plan:
    """The plan in which some units leave."""
    edits = []
    for name, ranks in cut.items():
        axis = network.axis(name)
        gone = set(ranks)
        edits.append(Keep(name, axis.size, tuple(rank for rank in range(axis.size) if rank not in gone)))
    return Plan(tuple(edits), network.fingerprint)


def key_of(weights: Mapping[str, Tensor], network: Network, survey: Survey, images: Tensor, first: str) -> str:
    """What a measurement hangs on, as a name; `first` is the criterion that configurations are drawn around."""
    decides = [SCHEMA, network.fingerprint, asdict(survey), first, digest(dict(weights)), digest([images])]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:20]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises with the batch at hand and remembers nothing; all else runs as in evaluation."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with evaluating(model):
        before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
        for norm in norms:
            norm.training, norm.momentum, norm.num_batches_tracked = True, 0.0, None
        try:
            yield
        finally:
            for norm, (momentum, tracked) in zip(norms, before, strict=True):
                norm.training, norm.momentum, norm.num_batches_tracked = False, momentum, tracked


def _starts(network: Network) -> list[int]:
    return [0, *np.cumsum([axis.size for axis in network.axes]).tolist()][:-1]


def _by_axis(network: Network, score_U: Tensor) -> dict[str, Tensor]:
    """Scores of the prunable axes that the criterion judges."""
    return {
        axis.name: score_U[start : start + axis.size]
        for axis, start in zip(network.axes, _starts(network), strict=True)
        if axis.prunable and bool(score_U[start : start + axis.size].isfinite().all())
    }


def _few(
    network: Network, base: Mapping[str, Tensor], survey: Survey, random: np.random.Generator, count: int, axes: int
) -> Iterator[Cut]:
    """Configurations of one axis, in turn, or of several, drawn."""
    names = list(base)
    for number in range(count):
        chosen = [names[number % len(names)]] if axes == 1 else random.choice(names, axes, replace=False).tolist()
        cut = {}
        for name in chosen:
            size = network.axis(name).size
            least = max(1, int(np.ceil(survey.floor * size)))
            gone = int(random.integers(1, max(size - least, 1) + 1))
            score_U = base[name].numpy() if random.random() < 0.7 else random.random(size)
            disturbed_U = score_U * np.exp(survey.unit_noise * random.standard_normal(size))
            cut[name] = tuple(sorted(np.argsort(disturbed_U, kind="stable")[:gone].tolist()))
        yield cut


def _together(
    network: Network, base: Mapping[str, Tensor], survey: Survey, random: np.random.Generator
) -> Iterator[Cut]:
    for _ in range(survey.together):
        noise = {}
        for name, score_U in base.items():
            noise[name] = survey.unit_noise * random.standard_normal(len(score_U))
            noise[name] += survey.axis_noise * random.standard_normal()
        share = float(np.exp(random.uniform(np.log(survey.least), np.log(survey.most))))
        yield from _allocated(network, base, noise, share, survey.floor)


def _search(
    network: Network,
    base: Mapping[str, Tensor],
    survey: Survey,
    random: np.random.Generator,
    number: int,
    measured: _Measured,
) -> None:
    """Climb from the scores as they are: up to three axes are made worth more or less, and stay so where that helps."""
    names = list(base)
    share = survey.least * (survey.most / survey.least) ** ((number + 0.5) / survey.searches)
    factors, last, best = dict.fromkeys(names, 0.0), None, np.inf
    for move in range(survey.moves + 1):
        changed = dict(factors)
        if move:
            for name in random.choice(names, min(3, len(names)), replace=False).tolist():
                changed[name] += survey.axis_noise * random.standard_normal()
        for cut in _allocated(network, base, changed, share, survey.floor):
            value = best if cut == last else measured.add(cut, search=number)
            if value <= best:
                factors, last, best = changed, cut, value


def _allocated(
    network: Network, base: Mapping[str, Tensor], logs: Mapping[str, Any], share: float, floor: float
) -> Iterator[Cut]:
    """What leaves where scores are multiplied by exponentials; nothing where that budget cannot be met or holds."""
    scores = {
        name: (score_U.clamp_min(0) + 1e-12) * torch.from_numpy(np.exp(logs[name] + np.zeros(len(score_U))))
        for name, score_U in base.items()
    }
    try:
        problem = Problem(network, scores, {"macs": share * network.cost().macs}, additive=True, floor=floor)
    except BudgetError:
        return
    cut = {}
    for name, ranks in Global().allocate(problem).items():
        stays = set(ranks)
        gone = tuple(rank for rank in range(network.axis(name).size) if rank not in stays)
        if gone:
            cut[name] = gone
    if cut:
        yield cut
