"""Every criterion with every allocator, where nothing is trained: accuracy of the cut network on test images.

    python benchmarks/criteria.py --data cifar10:FOLDER --out lines.jsonl \\
        --models cifar_resnet20=FILE.safetensors cifar_resnet56=FILE.safetensors
    python benchmarks/criteria.py --data cifar10:FOLDER --out lines.jsonl --models cifar_resnet20=FILE.safetensors \\
        --top 4 --macs 0.667 0.4 0.333
    python benchmarks/criteria.py --data digits --out lines.jsonl --population FOLDER --members mobilenet vit

Networks are those of the zoo with given weights, or of a population that `metaprune metatrain` has trained (its first
validation network whose name has the word). BatchNorm is re-estimated for everyone, and every arm runs with and without
the recoveries of `--recoveries`, on the augmented training images that the seed draws, which are those that criteria
and allocators see. With `--rounds` the network is healed by that recovery and looked at again on the way. `--top` takes
the best pairs of criterion and allocator of each network among the lines that are there at half the
multiply-accumulates: that is a choice by test images, so the best of them looks better than it is.

One JSON line a network, criterion, allocator, budget, seed and recovery; arms that are in the file already are left
out, so that a benchmark can be run in parts and goes on after it was stopped. At the end a table of all that is in the
file, and with `--figure` a picture. `distortion` takes a run of the network for every unit: leave it out where that is
long.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import metaprune as mp
from metaprune import data, zoo
from metaprune.allocate import ALLOCATORS
from metaprune.criteria import CRITERIA, Calibration, Criterion, Scores, Verdict
from metaprune.errors import MetapruneError
from metaprune.graph import Network
from metaprune.measure import accuracy
from metaprune.metatrain import Population
from metaprune.planning import calibration_batches
from metaprune.recovery import Context, resolve
from metaprune.task import Classification

KEY = ("model", "criterion", "allocator", "macs_asked", "seed", "recovery", "rounds")
HALF = 0.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Known(Criterion):
    """A verdict that was given before, so that it serves all allocators and budgets."""

    verdict: Verdict
    losses: bool

    @property
    def additive(self) -> bool:  # type: ignore[override]
        """What the criterion said."""
        return self.losses

    def _judge(self, network: Network, calibration: Calibration) -> Verdict:
        return self.verdict

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        return self.verdict.scores


class Bench:
    """A network, its data, and the arms to run on it."""

    def __init__(self, name: str, module: nn.Module, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.images = data.load(options.data)
        self.network = mp.trace(module.eval(), next(self.images.train.batches(2))[0])
        self.test = self.images.test.subset(options.images, 0) if options.images else self.images.test

    def arms(self, done: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        """Pairs of criterion and allocator."""
        if not self.options.top:
            yield from product(self.options.criteria, self.options.allocators)
            return
        reached: dict[tuple[str, str], list[float]] = {}
        for line in done:
            if line["model"] == self.name and line["macs_asked"] == HALF:
                reached.setdefault((line["criterion"], line["allocator"]), []).append(line["accuracy"])
        yield from sorted(reached, key=lambda arm: -statistics.mean(reached[arm]))[: self.options.top]

    def run(self, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One line an arm that is not done yet."""
        known = {tuple(line[key] for key in KEY) for line in done}
        for seed in range(self.options.seeds):
            verdicts: dict[str, tuple[Criterion, float]] = {}
            for (criterion, allocator), share, recovery in product(
                list(self.arms(done)), self.options.macs, self.options.recoveries
            ):
                line = {
                    "model": self.name,
                    "criterion": criterion,
                    "allocator": allocator,
                    "macs_asked": share,
                    "seed": seed,
                    "recovery": recovery,
                    "rounds": self.options.rounds,
                }
                if tuple(line.values()) not in known:
                    try:
                        if self.options.rounds > 1:  # each looks at a network of its own
                            verdicts[criterion] = (CRITERIA[criterion](), 0.0)
                        elif criterion not in verdicts or criterion == "metanet":  # whose scores hold for one budget
                            verdicts[criterion] = self.judged(criterion, share, seed)
                        yield line | self.measured(*verdicts[criterion], allocator, share, recovery, seed)
                    except MetapruneError as error:
                        Console(stderr=True).print(f"{self.name}, {criterion}, {allocator}: {error}")

    def judged(self, criterion: str, share: float, seed: int) -> tuple[Known, float]:
        """What a criterion says, and the seconds that it took."""
        start, judge = time.perf_counter(), CRITERIA[criterion]()
        batches = calibration_batches(self.images, self.options.calibration, seed)
        verdict = judge.judge(self.network, Calibration(batches, Classification(), seed, share))
        return Known(verdict=verdict, losses=judge.additive), round(time.perf_counter() - start, 2)

    def measured(
        self, judge: Criterion, scoring_s: float, allocator: str, share: float, recovery: str, seed: int
    ) -> dict[str, Any]:
        """Accuracy after the cut and the recovery, cost, and seconds."""
        batches = calibration_batches(self.images, self.options.calibration, seed)
        start = time.perf_counter()
        plan = mp.plan(
            self.network, f"macs={share}", judge, allocator, data=batches, seed=seed,
            calibration=self.options.calibration, rounds=self.options.rounds, between=recovery,
        )  # fmt: skip
        slim, allocation_s = self.network.apply(plan), round(time.perf_counter() - start, 2)
        context = Context(calibration=batches, dense=self.network.model, network=self.network, plan=plan, seed=seed)
        start = time.perf_counter()
        for way in resolve(recovery):
            slim = way.recover(slim, context).model
        return {
            "accuracy": accuracy(slim.eval(), self.test).top1,
            "macs": self.network.cost_of(plan).macs / self.network.cost().macs,
            "split": "test",
            "images": len(self.test),
            "scoring_s": scoring_s,
            "allocation_s": allocation_s,
            "recovery_s": round(time.perf_counter() - start, 2),
        }


def networks(options: argparse.Namespace) -> Iterator[tuple[str, nn.Module]]:
    """What was asked for, by name."""
    for model in options.models:
        name, _, weights = model.partition("=")
        module = zoo.build(name)
        zoo.load_weights(module, weights)
        yield name, module
    if options.members:
        members = Population.load(options.population).members
        for word in options.members:
            fitting = [m for m in members if m.kind == "trained" and m.split == "validation" and word in m.name]
            if not fitting:
                raise SystemExit(f"the population must have a trained validation network like {word!r}, but has none.")
            yield f"{fitting[0].name.split()[0]} on {options.data}", fitting[0].model


def read(file: Path | None) -> list[dict[str, Any]]:
    """Lines that were written before."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []


def circumstances() -> dict[str, str]:
    """Where and with what it ran."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"commit": commit.stdout.strip(), "device": platform.machine(), "torch": torch.__version__}


def columns(lines: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[tuple[str, str], list[float]]]:
    """Accuracies over the seeds: by model, share and recovery, then by criterion and allocator."""
    found: dict[tuple[Any, ...], dict[tuple[str, str], list[float]]] = {}
    for line in lines:
        way = line["recovery"] + (f", {line['rounds']} rounds" if line["rounds"] > 1 else "")
        column = found.setdefault((line["model"], line["macs_asked"], way), {})
        column.setdefault((line["criterion"], line["allocator"]), []).append(line["accuracy"])
    return dict(sorted(found.items()))


def print_table(lines: list[dict[str, Any]]) -> None:
    """Mean and standard deviation over the seeds, a row each criterion and allocator."""
    found = columns(lines)
    table = Table("criterion", "allocator", *(f"{model}\nmacs={share:g}\n{way}" for model, share, way in found))
    for arm in sorted({arm for column in found.values() for arm in column}):
        cells = [
            f"{statistics.mean(column[arm]):.1f} ± {statistics.pstdev(column[arm]):.1f}" if arm in column else ""
            for column in found.values()
        ]
        table.add_row(*arm, *cells)
    Console(stderr=True, width=40 + 22 * len(found)).print(table)


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """A row a recovery, a column a network: accuracy at half the multiply-accumulates by criterion and allocator.

    Criteria stand in one order, by their best allocator in the mean over the panels.
    """
    from matplotlib.figure import Figure

    found = {(model, way): column for (model, share, way), column in columns(lines).items() if share == HALF}
    if not found:
        raise SystemExit(
            f"the figure shows budgets of {HALF:g}, but none is among the lines. Run with --macs {HALF:g}."
        )
    models, ways = (list(dict.fromkeys(key[k] for key in found)) for k in (0, 1))
    means = {key: {arm: statistics.mean(values) for arm, values in column.items()} for key, column in found.items()}
    allocators = sorted({allocator for column in means.values() for _, allocator in column})
    best: dict[str, list[float]] = {}
    for column in means.values():
        for name in {criterion for criterion, _ in column}:
            best.setdefault(name, []).append(
                max(value for (criterion, _), value in column.items() if criterion == name)
            )
    criteria = sorted(best, key=lambda name: statistics.mean(best[name]))
    figure = Figure(figsize=(3.2 * len(models) + 1, 0.21 * len(criteria) * len(ways) + 1), layout="constrained")
    panels = figure.subplots(len(ways), len(models), squeeze=False, sharex="row", sharey=True)
    for row, way in zip(panels, ways):
        for axes, model in zip(row, models):
            for allocator in allocators:
                here = [name for name in criteria if (name, allocator) in means.get((model, way), {})]
                values = [means[model, way][name, allocator] for name in here]
                axes.plot(values, [criteria.index(name) for name in here], "o", label=allocator, alpha=0.7, ms=4)
            axes.set_yticks(range(len(criteria)), criteria, fontsize=7)
            axes.set_title(f"{model}, {way}", fontsize=8)
            axes.tick_params(axis="x", labelsize=7)
            axes.grid(alpha=0.3)
    figure.supxlabel("test accuracy at half the multiply-accumulates, %", fontsize=8)
    panels[0, 0].legend(fontsize=7)
    figure.savefig(file, dpi=110)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=FILE", help="networks of the zoo, and weights")
    parser.add_argument("--population", type=Path, help="folder of trained networks")
    parser.add_argument("--members", nargs="*", default=[], metavar="WORD", help="which of them")
    parser.add_argument("--criteria", nargs="+", choices=list(CRITERIA), default=list(CRITERIA), metavar="NAME")
    parser.add_argument(
        "--allocators", nargs="+", choices=list(ALLOCATORS), default=["uniform", "global", "rd"], metavar="NAME"
    )
    parser.add_argument("--macs", nargs="+", type=float, default=[HALF], help="shares of the multiply-accumulates")
    parser.add_argument("--recoveries", nargs="+", default=["recalibrate_norm"], help="each a list with commas")
    parser.add_argument("--rounds", type=int, default=1, help="of looking at what is left, healed by the recovery")
    parser.add_argument("--top", type=int, default=0, help="only so many pairs, the best of those at half")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the calibration images")
    parser.add_argument("--calibration", type=int, default=1024, help="training images")
    parser.add_argument("--images", type=int, default=0, help="test images, 0 for all")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines, added to")
    parser.add_argument("--figure", type=Path, help="file of the picture")
    options = parser.parse_args()
    lines, told = read(options.out), circumstances()
    for name, module in networks(options):
        for line in Bench(name, module, options).run(list(lines)):
            lines.append(line | told)
            with options.out.open("a") as stream:
                print(json.dumps(lines[-1]), file=stream)
    print_table(lines)
    if options.figure:
        draw(lines, options.figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
