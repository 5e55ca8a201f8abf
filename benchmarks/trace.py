"""Time of tracing against Torch-Pruning, and of costs and cuts; one JSON line a measurement.

    pip install -e ".[bench]"
    OMP_NUM_THREADS=1 python benchmarks/trace.py --runs 9
    OMP_NUM_THREADS=1 python benchmarks/trace.py --networks densenet201 --runs 3

*trace*: reading the network and listing every axis, against the peer's graph and a list of all its groups, on the same
model and input. The two take turns, in an order that changes with every run, after one run of each that does not count;
the ratio is the median of the ratios of neighbours. *cost*: configurations a second. *apply*: slicing alone, and with
the trace of the result that checks it. *decoder*: a decoder of 7 billion parameters on the meta device.
"""

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from metaprune.graph import Network, trace
from metaprune.graph.surgery import sliced_copy
from metaprune.planning import plan
from metaprune.zoo import build, imagenet

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
NETWORKS = ("resnet50", "densenet121", "densenet201", "vit_b", "mobilenet_v3")
DECODER = {"vocabulary": 32000, "width": 4096, "depth": 32, "num_heads": 32, "num_kv_heads": 32, "hidden": 11008}


_clock: list[Callable[[], float]] = [time.perf_counter]


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=NETWORKS, choices=NETWORKS)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--only", choices=("trace", "cost", "apply", "decoder"), help="leave the others out")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for machines that others use too")
    given = parser.parse_args()
    _clock.append(CLOCKS[given.clock])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peer's, about parameters outside of layers
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "decoder": _decoder,  # first, because the peak of memory is that of the process
        "trace": lambda: (_trace(name, given.runs) for name in given.networks),
        "cost": lambda: _cost(given.runs),
        "apply": lambda: _apply(given.runs),
    }
    for name, part in parts.items():
        if given.only in (None, name):
            for figures in part():
                print(json.dumps({"benchmark": name, **figures, "clock": given.clock, **_context()}), flush=True)


def _trace(name: str, runs: int) -> dict[str, Any]:
    import torch_pruning

    model, image = getattr(imagenet, name)().eval(), torch.randn(1, 3, 224, 224)

    def ours() -> int:
        return len(trace(model, image).axes)

    def peer() -> int:
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=image)
        return len(list(graph.get_all_groups()))

    axes, groups = ours(), peer()
    seconds: dict[Callable[[], int], list[float]] = {ours: [], peer: []}
    order = random.Random(0)
    for _ in range(runs):
        for way in order.sample([ours, peer], 2):
            seconds[way].append(_seconds(way))
    ratios = [mine / other for mine, other in zip(seconds[ours], seconds[peer], strict=True)]
    return {
        "network": name,
        "axes": axes,
        "groups": groups,
        "ours_s": _spread(seconds[ours]),
        "peer_s": _spread(seconds[peer]),
        "ratio": _spread(ratios),
        "peer_version": torch_pruning.__version__,
    }


def _cost(runs: int, rows: int = 100_000) -> Iterator[dict[str, Any]]:
    for name in ("resnet50", "densenet201"):
        net = trace(getattr(imagenet, name)().eval(), torch.randn(1, 3, 224, 224))
        full = np.array([axis.size for axis in net.axes])
        low = np.where([axis.prunable for axis in net.axes], 1, full)
        sizes = np.random.default_rng(0).integers(low, full + 1, (rows, len(full)))
        net.cost_many(sizes[:1])
        rates = [rows / _seconds(lambda: net.cost_many(sizes)) for _ in range(runs)]  # noqa: B023
        yield {"network": name, "configurations_per_s": _spread(rates)}


def _apply(runs: int) -> Iterator[dict[str, Any]]:
    net = trace(imagenet.resnet50().eval(), torch.randn(1, 3, 224, 224))
    decided = plan(net, "macs=0.5", criterion="random")
    alive = net._alive(decided.draft())
    yield {
        "network": "resnet50",
        "params": net.cost().params,
        "slice_s": _spread([_seconds(lambda: sliced_copy(net.model, net._layout, alive, {})) for _ in range(runs)]),
        "apply_s": _spread([_seconds(lambda: net.apply(decided)) for _ in range(runs)]),
    }


def _decoder() -> Iterator[dict[str, Any]]:
    with torch.device("meta"):
        model = build("llama_tiny", **DECODER)
        tokens = torch.zeros(1, 128, dtype=torch.int64)
    before = _peak_mb()
    made: list[Network] = []
    traced = _seconds(lambda: made.append(trace(model, tokens)))
    net = made[0]
    costs = _seconds(net.cost)
    cost = net.cost()
    yield {
        "network": "llama 7B",
        "params": cost.params,
        "macs": cost.macs,
        "axes": len(net.axes),
        "trace_s": traced,
        "cost_s": costs,
        "extra_peak_mb": _peak_mb() - before,
    }


def _seconds(call: Callable[[], Any]) -> float:
    now = _clock[-1]
    start = now()
    call()
    return now() - start


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _context() -> dict[str, str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"commit": commit.stdout.strip(), "device": platform.machine(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
