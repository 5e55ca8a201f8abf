"""What a metanetwork gains: accuracy over speed-up on test images, beside plain criteria and a peer.

    python benchmarks/metanet_gain.py --population FOLDER --data digits
    python benchmarks/metanet_gain.py --model zoo:cifar_resnet56 --weights FILE --data cifar10:FOLDER
    python benchmarks/metanet_gain.py --model zoo:cifar_resnet20 --weights FILE --data cifar10:FOLDER \\
        --recovery recalibrate_norm,finetune --epochs 5
    python benchmarks/metanet_gain.py --model zoo:cifar_resnet56 --weights FILE --data cifar10:FOLDER --exact \\
        --recovery reconstruct

Networks are the validation members of a population, or one that is given; none of them taught the metanetwork. Every
arm allocates globally by score per cost to the same share of the multiply-accumulates, sees the same augmented training
images, which the seed draws, and is healed in the same way, by as many epochs. `--editor` is a metanetwork that edits,
`--paper` one of ``mode: paper`` (``metaprune metatrain paper``); arms without one are left out, and so is Torch-Pruning
(global, first-order Taylor, its ratio by bisection) where it is not installed or fails.

One JSON line a network, arm, seed and ratio, with the paired difference to the plain criterion that is best on these
very test images, which favours it; a table of means and standard deviations over networks and seeds; with `--figure` a
picture.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peer_pruning import by_torch_pruning
from rich.console import Console
from rich.table import Table
from torch import nn

from metaprune import data, zoo
from metaprune.allocate import ALLOCATORS, Problem
from metaprune.criteria import CRITERIA, Calibration, Scores, Verdict, metanet_edit, metanet_scores, unit_scores
from metaprune.edits import Keep
from metaprune.errors import BudgetError
from metaprune.graph import Network, trace
from metaprune.measure import Accuracy, accuracy, compare
from metaprune.metanet import load_checkpoint, read_blocks
from metaprune.metatrain import Curve, Population
from metaprune.metatrain.evaluate import RATIOS, plan_at
from metaprune.metatrain.survey import calibration_images
from metaprune.plans import Plan
from metaprune.recovery import Context, Recovery, resolve
from metaprune.task import Classification

PLAIN = ("random", "l1", "l2", "gaussian", "taylor")
EXACT = ("obs + rd", "metanet + rd", "obs, metanet's axes + rd")  # with --exact: allocated by dynamic programming
ARMS = (
    *PLAIN, "metanet", "metanet without data", "edit + taylor", "edit + metanet", "paper", *EXACT, "torch_pruning",
)  # fmt: skip
Cut = Callable[[float], tuple[nn.Module, Plan | None]]  # share of the multiply-accumulates -> cut network, and how


def networks(options: argparse.Namespace, dataset: data.Dataset) -> Iterator[tuple[str, Network]]:
    """Networks to prune, by name."""
    if options.population is not None:
        for member in Population.load(options.population).validation:
            if member.kind == "trained":
                yield member.name, trace(member.model, member.example_inputs)
        return
    model = zoo.resolve_model(options.model).module
    zoo.load_weights(model, options.weights)
    yield options.model, trace(model.eval(), next(dataset.train.batches(2))[0])


def arms(network: Network, dataset: data.Dataset, options: argparse.Namespace, seed: int) -> Iterator[tuple[str, Cut]]:
    """What makes a network of a share, by the name of the arm."""
    calibration = Calibration(calibration_images(dataset.train, options.calibration, seed), Classification(), seed)
    reads, blocks = unit_scores(network, calibration, PLAIN), read_blocks(network.to_graph())
    blind = {name: score_U for name, score_U in reads.items() if name != "taylor"}
    sizes = [axis.size for axis in network.axes]

    def plain(name: str, edited: Network) -> Scores:
        score_U = reads[name] if edited is network else unit_scores(edited, calibration, [name])[name]
        parts = zip(network.axes, score_U.split(sizes), strict=True)
        return {axis.name: part for axis, part in parts if axis.prunable and bool(part.isfinite().all())}

    def by(scores_at: Callable[[float], Scores], tensors: dict[str, torch.Tensor] | None = None) -> Cut:
        def cut(share: float) -> tuple[nn.Module, Plan]:
            plan = plan_at(network, scores_at(share), share, tensors=tensors)
            return network.apply(plan), plan

        return cut

    def judged(metanet: Any, seen: Any) -> Callable[[float], Scores]:
        return lambda share: metanet_scores(metanet, network, blocks, seen, share)

    for name in reads:
        scores = plain(name, network)
        yield name, by(lambda share, scores=scores: scores)
    metanet = load_checkpoint(options.metanet).metanet
    yield "metanet", by(judged(metanet, reads))
    yield "metanet without data", by(judged(metanet, blind))
    if options.editor:
        editor = load_checkpoint(options.editor).metanet
        tensors = metanet_edit(editor, network, blocks, reads, 0.5)
        scores = plain("taylor", network.with_tensors(tensors))
        yield "edit + taylor", by(lambda share: scores, tensors)
        yield "edit + metanet", by(judged(editor, reads), tensors)
    if options.paper:
        published = load_checkpoint(options.paper).metanet
        yield "paper", by(judged(published, {}), metanet_edit(published, network, blocks, {}, 0.5))
    if options.exact:
        verdict = CRITERIA["obs"]().judge(network, calibration)

        def by_rd(verdict_at: Callable[[float], Verdict]) -> Cut:
            def cut(share: float) -> tuple[nn.Module, Plan]:
                said = verdict_at(share)
                limits = {"macs": share * network.cost().macs}
                problem = Problem(network, said.scores, limits, additive=True, floor=0.05, curves=said.curves)
                kept = ALLOCATORS["rd"]().allocate(problem).items()
                plan = Plan(tuple(Keep(name, network.axis(name).size, ranks) for name, ranks in kept))
                return network.apply(plan), plan

            return cut

        yield EXACT[0], by_rd(lambda share: verdict)
        yield EXACT[1], by_rd(lambda share: Verdict(judged(metanet, reads)(share)))
        yield EXACT[2], by_rd(lambda share: at_scale_of(verdict, judged(metanet, reads)(share)))
    images = dataset.train.subset(options.calibration, seed)
    yield "torch_pruning", lambda share: (by_torch_pruning(network.model, share, images, inside=True), None)


def at_scale_of(verdict: Verdict, scores: Scores) -> Verdict:
    """The verdict on units, with curves scaled to what others say that the worse half of each axis is worth together.

    Axes that the others do not judge keep their place among those that they do, by the median of the factors.
    """
    factors = {}
    for name, curve_K in verdict.curves.items():
        half, said = len(curve_K) // 2, scores.get(name)
        if said is not None and float(curve_K[half]) > 0:
            worse = verdict.scores[name].argsort()[: len(said) - half]
            factors[name] = float(said[worse].sum() / curve_K[half])
    middle = statistics.median(factors.values())
    return Verdict(verdict.scores, {name: factors.get(name, middle) * curve for name, curve in verdict.curves.items()})


def measured(
    network: Network, cut: Cut, ways: list[Recovery], dataset: data.Dataset, options: argparse.Namespace, seed: int
) -> list[Accuracy | None]:
    """Accuracy of an arm at every ratio, None where it cannot go so far."""
    found: list[Accuracy | None] = []
    images = calibration_images(dataset.train, options.calibration, seed)
    test = dataset.test.subset(options.images, 0) if options.images else dataset.test
    for ratio in options.ratios:
        try:
            slim, plan = cut(1 / ratio)
        except BudgetError:
            found.append(None)
            continue
        context = Context(
            train=dataset.train, calibration=images, dense=network.model, network=network, plan=plan, seed=seed
        )
        for way in ways:
            slim = way.recover(slim, context).model
        found.append(accuracy(slim.eval(), test))
    return found


def lines_of(
    name: str, seed: int, found: dict[str, list[Accuracy | None]], ratios: list[float], chance: float
) -> Iterator[dict[str, Any]]:
    """One line an arm and ratio, and one with the area of each arm."""
    curves = {
        arm: Curve(tuple(ratios), tuple(chance if one is None else one.top1 for one in several))
        for arm, several in found.items()
    }
    best = max((arm for arm in (*PLAIN, EXACT[0]) if arm in curves), key=lambda arm: curves[arm].area, default=None)
    for arm, several in found.items():
        for place, (ratio, one) in enumerate(zip(ratios, several)):
            line = {
                "network": name,
                "arm": arm,
                "seed": seed,
                "ratio": ratio,
                "accuracy": curves[arm].accuracies[place],
            }
            other = found[best][place] if best is not None else None
            if one is not None:
                line |= {"split": "test", "images": one.n}
                line |= {} if other is None or arm == best else {f"minus {best}": compare(other, one).to_json()}
            yield line
        yield {"network": name, "arm": arm, "seed": seed, "ratio": "area", "accuracy": curves[arm].area}


def table_of(lines: list[dict[str, Any]], columns: list[Any]) -> Table:
    """Means and standard deviations over networks and seeds."""
    table = Table("arm", *(column if column == "area" else f"{column:g}x" for column in columns))
    for arm in dict.fromkeys(line["arm"] for line in lines):
        cells = []
        for column in columns:
            values = [line["accuracy"] for line in lines if (line["arm"], line["ratio"]) == (arm, column)]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}")
        table.add_row(arm, *cells)
    return table


def draw(lines: list[dict[str, Any]], ratios: list[float], path: Path) -> None:
    """Mean accuracy over ratios, a line an arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.add_subplot()
    for arm in dict.fromkeys(line["arm"] for line in lines):
        means = [
            statistics.mean(line["accuracy"] for line in lines if (line["arm"], line["ratio"]) == (arm, ratio))
            for ratio in ratios
        ]
        panel.plot(ratios, means, marker="o", label=arm, linewidth=2.5 if arm == "metanet" else 1)
    panel.set_xlabel("times fewer MACs")
    panel.set_ylabel("accuracy, % of test images")
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--population", type=Path, help="folder of a population")
    parser.add_argument("--model", help="instead of a population, with --weights")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--metanet", default="default")
    parser.add_argument("--editor", help="a metanetwork whose edit is used")
    parser.add_argument("--paper", help="a metanetwork of `mode: paper`")
    parser.add_argument("--exact", action="store_true", help="arms of dynamic programming too; with `reconstruct`")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    parser.add_argument("--ratios", nargs="*", type=float, default=list(RATIOS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--calibration", type=int, default=1024, help="training images")
    parser.add_argument("--images", type=int, help="test images; all if not given")
    parser.add_argument("--recovery", default="recalibrate_norm")
    parser.add_argument("--epochs", type=int, help="of recoveries that train")
    parser.add_argument("--out", type=Path, help="file for the JSON lines; standard output if not given")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    dataset = data.load(options.data)
    ways = resolve(options.recovery, epochs=options.epochs)
    chance = 100 / (int(dataset.test.labels_all.max()) + 1)
    stream = options.out.open("w") if options.out else sys.stdout
    lines: list[dict[str, Any]] = []
    for name, network in networks(options, dataset):
        for seed in options.seeds:
            found: dict[str, list[Accuracy | None]] = {}
            for arm, cut in arms(network, dataset, options, seed):
                if arm in options.arms:
                    try:
                        found[arm] = measured(network, cut, ways, dataset, options, seed)
                    except Exception as error:
                        if arm != "torch_pruning":  # the peer may lack, or fail on, this network
                            raise
                        print(f"{name}: torch_pruning: {type(error).__name__}: {error}", file=sys.stderr)
            for line in lines_of(name, seed, found, options.ratios, chance):
                print(json.dumps({**line, "recovery": options.recovery}), file=stream, flush=True)
                lines.append(line)
    Console(stderr=True, width=110).print(table_of(lines, [*options.ratios, "area"]))
    if options.figure:
        draw(lines, options.ratios, options.figure)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
