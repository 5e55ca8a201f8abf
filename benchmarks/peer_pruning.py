"""One budget, two engines: metaprune beside Torch-Pruning on trained CIFAR-10 ResNets, image by image.

    python benchmarks/peer_pruning.py --weights $METAPRUNE_DATA/weights --data cifar10:FOLDER

Both score with first-order Taylor on the same training images, prune globally with the same floor to the most MACs that
are at most the budget, and re-estimate BatchNorm on the same images. The peer runs twice: on every group, and on the
inside of residual blocks alone, which it does best: of 14 settings tried at depth 56 (plain or augmented images, one or
many variables, normalised or not, isomorphic, inside alone) this gave it the most on the test split, 79.5 %.
Nothing of ours is chosen on the test split; the two are compared on it, paired. Prints one JSON line a depth and seed.
Needs the extra `bench`.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import metaprune as mp
from metaprune import data, zoo
from metaprune.measure import Accuracy, accuracy, compare
from metaprune.planning import calibration_batches
from metaprune.recovery import Context, RecalibrateNorm
from metaprune.zoo.resnet import CifarResNet

EXAMPLE = torch.randn(1, 3, 32, 32)
FLOOR = 0.1


def main() -> None:
    """Run every depth and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="folder with cifar10_resnet{depth}.safetensors")
    parser.add_argument("--data", required=True, help="cifar10:FOLDER")
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--macs", type=float, default=0.5, help="share of the dense MACs")
    parser.add_argument("--calibration", type=int, default=2048, help="training images to look at")
    options = parser.parse_args()
    images = data.load(options.data)
    for depth in options.depths:
        dense = zoo.build(f"cifar_resnet{depth}").eval()
        dense.load_state_dict(load_file(options.weights / f"cifar10_resnet{depth}.safetensors"))
        for seed in options.seeds:
            batches = calibration_batches(images, options.calibration, seed)
            plain = images.train.subset(options.calibration, seed)
            arms = {
                "metaprune": by_metaprune(dense, options.macs, batches, seed),
                "torch_pruning": by_torch_pruning(dense, options.macs, plain, inside=False),
                "torch_pruning_inside": by_torch_pruning(dense, options.macs, plain, inside=True),
            }
            print(json.dumps({"depth": depth, "seed": seed, **line(dense, arms, batches, images)}), flush=True)


def by_metaprune(dense: nn.Module, share: float, batches: Callable[[], Iterator[Any]], seed: int) -> nn.Module:
    """The network at the budget, cut by metaprune."""
    network = mp.trace(dense, EXAMPLE)
    plan = mp.plan(network, f"macs={share}", "taylor", "global", data=batches, seed=seed, floor=FLOOR)
    return network.apply(plan)


def by_torch_pruning(dense: nn.Module, share: float, images: data.Split, *, inside: bool) -> nn.Module:
    """The network at the budget, cut by Torch-Pruning."""
    example = next(images.batches(2))[0]
    graded = copy.deepcopy(dense)
    for images_NCHW, labels_N in images.batches(128):
        F.cross_entropy(graded(images_NCHW), labels_N).backward()
    return at_share(
        share * macs(dense, example), example, lambda ratio: _peer_at(graded, example, ratio, inside=inside)
    )


def at_share(limit: float, example: Any, cut: Callable[[float], nn.Module]) -> nn.Module:
    """The largest network of at most so many MACs that a ratio of the peer gives, by bisection in 12 steps.

    Raises:
        RuntimeError: None is so small.
    """
    best, low, high = None, 0.0, 1.0
    for _ in range(12):
        ratio = (low + high) / 2
        slim = cut(ratio)
        if macs(slim, example) <= limit:
            high, best = ratio, slim
        else:
            low = ratio
    if best is None:
        raise RuntimeError(f"Torch-Pruning cannot reach {limit:g} MACs with a floor of {FLOOR}.")
    return best


def _peer_at(graded: nn.Module, example: torch.Tensor, ratio: float, *, inside: bool) -> nn.Module:
    import torch_pruning

    slim = copy.deepcopy(graded)
    for mine, theirs in zip(slim.parameters(), graded.parameters()):
        mine.grad = theirs.grad
    stream = [module for name, module in slim.named_modules() if name == "conv1" or name.endswith("conv2")]
    last = [module for module in slim.modules() if isinstance(module, nn.Linear)][-1]
    pruner = torch_pruning.pruner.BasePruner(
        slim,
        example,
        importance=torch_pruning.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=ratio,
        max_pruning_ratio=1 - FLOOR,
        ignored_layers=[last, *(stream if inside and isinstance(graded, CifarResNet) else [])],
    )
    pruner.step()
    slim.zero_grad(set_to_none=True)
    return slim


def healed(model: nn.Module, batches: Callable[[], Iterator[Any]], images: data.Dataset) -> Accuracy:
    """Accuracy on the test split, after BatchNorm was re-estimated on the calibration images."""
    return accuracy(RecalibrateNorm().recover(model, Context(calibration=batches)).model.eval(), images.test)


def macs(model: nn.Module, example: Any) -> int:
    """Multiply-accumulates of one image, counted by one counter for both engines."""
    return mp.trace(model, example).cost().macs


def line(
    dense: nn.Module, arms: dict[str, nn.Module], batches: Callable[[], Iterator[Any]], images: data.Dataset
) -> dict[str, Any]:
    """Accuracy and MACs of every arm, and the paired difference of the first to each other."""
    told: dict[str, Any] = {}
    reached = {name: healed(model, batches, images) for name, model in arms.items()}
    first = next(iter(reached))
    for name, accuracy_ in reached.items():
        told[name] = {
            "accuracy": accuracy_.top1,
            "images": accuracy_.n,
            "macs": macs(arms[name], EXAMPLE) / macs(dense, EXAMPLE),
        }
        if name != first:
            told[f"{first}_minus_{name}"] = compare(accuracy_, reached[first]).to_json()
    return told


if __name__ == "__main__":
    main()
