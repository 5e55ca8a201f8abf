"""What fewer MACs are worth in time: metaprune beside Torch-Pruning on onnxruntime, as a share of what theory promises.

    pip install -e ".[bench]"
    OMP_NUM_THREADS=1 python benchmarks/edge.py --seconds 20

Every network is cut to the same share of its MACs by weights' norms alone (which units stay does not change the time,
how many does), exported, proved, and timed in one run: the dense file and all arms in random order in fresh processes.
`aligned` takes the alignment of the device's profile, on the axes of residual streams too; `depth` drops whole
residual branches, evenly spread, and aligns what is left to cut; `any_size` is the same as `aligned` with sizes as they
come; `torch_pruning` is the peer with its defaults. *theory* is the share of MACs turned round, *gained* the measured
speed-up over it. Prints one JSON line a network. Nothing is asserted; a quiet machine is needed.
"""

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peer_pruning import FLOOR, at_share, macs
from torch import nn

import metaprune as mp
from metaprune import zoo
from metaprune.edits import DropBlock
from metaprune.export import export
from metaprune.export.devices import load_device, settings_for
from metaprune.graph import Network
from metaprune.measure import latency
from metaprune.planning import reachable_limits

NETWORKS = ("cifar_resnet56", "cifar_mobilenet_v2", "vit_tiny")


def main() -> None:
    """Run every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="of the zoo")
    parser.add_argument("--macs", type=float, default=0.5, help="share of the dense MACs")
    parser.add_argument("--device", default="host", help="whose alignment")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring a network, at least")
    parser.add_argument("--rounds", type=int, default=300, help="of calls, at least")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peer's, about parameters outside of layers
    for name in given.networks:
        print(json.dumps({"network": name, **measured(name, given)}), flush=True)


def measured(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Theory and measurement of every arm of one network."""
    torch.manual_seed(0)
    dense, example = zoo.build(name).eval(), zoo.example_inputs(name)
    network = mp.trace(dense, example)
    ways: dict[str, Callable[[], nn.Module]] = {
        "aligned": lambda: aligned(network, given.macs, given.device),
        "depth": lambda: by_depth(network, given.macs, given.device),
        "any_size": lambda: network.apply(mp.plan(network, f"macs={given.macs}", floor=FLOOR)),
        "torch_pruning": lambda: by_torch_pruning(dense, example, given.macs, None),
        "torch_pruning_round_to_16": lambda: by_torch_pruning(dense, example, given.macs, 16),
    }
    told: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {"dense": export(dense, example, Path(folder) / "dense.onnx").path}
        for arm, make in ways.items():
            try:
                slim = make()
                files[arm] = export(slim, example, Path(folder) / f"{arm}.onnx").path
                told[arm] = {"theory": network.cost().macs / macs(slim, example)}
            except Exception as error:  # the peer fails in many ways; that is a finding too
                told[arm] = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        times = latency(list(files.values()), seconds=given.seconds, rounds=given.rounds, limit_s=20 * given.seconds)
    for arm, one in zip(list(files)[1:], times.comparisons):
        ratio = one.ratio
        assert ratio.low is not None
        assert ratio.high is not None
        told[arm] |= {
            "speedup": one.speedup,
            "interval": [1 / ratio.high, 1 / ratio.low],
            "gained": one.speedup / told[arm]["theory"],
            "verdict": one.verdict,
        }
    return {
        "arms": told,
        "dense_ms": times.arms[0].p50.value,
        "rounds": times.rounds,
        "control": [times.control.low, times.control.high],
        "cpu": times.host.cpu,
        "isa": list(times.host.isa),
        "runtime": times.runtime,
    }


def aligned(network: Network, share: float, device: str) -> nn.Module:
    """Sizes in the multiples that the device likes, or the largest multiples that reach the budget."""
    wanted = settings_for(
        load_device(device),
        network,
        f"macs={share}",
        reach=lambda budget, size: reachable_limits(network, budget, floor=FLOOR, round_to=size),
    )
    return network.apply(mp.plan(network, wanted.budget, round_to=wanted.round_to, floor=FLOOR))


def by_depth(network: Network, share: float, device: str) -> nn.Module:
    """Without residual branches, evenly spread, until the budget is met or none is left; then aligned to the budget."""
    limit, dropped = share * network.cost().macs, []
    candidates = [block.name for block in network.blocks]
    order = [*candidates[1::2], *candidates[2::4], *candidates[0::4]]
    for name in dict.fromkeys(order):
        if network.cost_of(mp.Plan(tuple(map(DropBlock, dropped)))).macs <= limit:
            break
        dropped.append(name)
    slim = network.apply(mp.Plan(tuple(map(DropBlock, dropped))))
    rest = mp.trace(slim, network.example_inputs)
    left = limit / rest.cost().macs
    return slim if left >= 1 else aligned(rest, left, device)


def by_torch_pruning(dense: nn.Module, example: Any, share: float, round_to: int | None) -> nn.Module:
    """The network at the budget, cut by Torch-Pruning as it comes."""
    outputs = [module for module in dense.modules() if isinstance(module, nn.Linear)][-1:]

    def cut(ratio: float) -> nn.Module:
        import torch_pruning

        slim, kept = copy.deepcopy((dense, outputs))
        pruner = torch_pruning.pruner.BasePruner(
            slim,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(),
            global_pruning=True,
            pruning_ratio=ratio,
            max_pruning_ratio=1 - FLOOR,
            round_to=round_to,
            ignored_layers=kept,
        )
        pruner.step()
        return slim

    return at_share(share * macs(dense, example), example, cut)


if __name__ == "__main__":
    main()
