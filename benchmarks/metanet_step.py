"""One meta-step of the default metanetwork: memory against the size of the network; and the published one factored.

Memory is the peak of the resident set above what it was before the step, in a fresh process for each network: states,
edited weights, their gradients (random here, so that the network's own training plays no part) and one vector-Jacobian
product. The slope over the networks is fitted by least squares; the intercept holds the tile and the node states.
Pieces from 64 KiB on are given back to the system when they are freed (``MALLOC_MMAP_THRESHOLD_``), because glibc
otherwise keeps several times what is in use.

The published metanetwork is timed beside plain message passing with the same weights on ResNet-56, forward and
backward, in one process, in turn.

    python benchmarks/metanet_step.py [--hidden 64] [--layers 8] [--repeats 3] [--out FILE]
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

NETWORKS = ("cifar_resnet20", "cifar_resnet56", "cifar_vgg11", "resnet50")


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network of the zoo, or one of torchvision's shape, and an input."""
    from metaprune.zoo import MODELS, example_inputs, imagenet
    from metaprune.zoo import build as from_zoo

    if name in MODELS:
        return from_zoo(name), example_inputs(name)
    return getattr(imagenet, name)(), torch.zeros(1, 3, 64, 64)


def memory(name: str, hidden: int, layers: int) -> dict[str, Any]:
    """Peak memory of one step above what was there before it, in bytes."""
    from metaprune.graph import trace
    from metaprune.metanet import Metanet, Shape, read_blocks

    torch.manual_seed(0)
    model, inputs = build(name)
    network = trace(model, inputs)
    blocks = read_blocks(network.to_graph(dense=True))
    metanet = Metanet(Shape(hidden=hidden, layers=layers))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    began = time.perf_counter()
    state_NH = metanet(blocks)
    edited = metanet.edit(blocks, state_NH)
    gradients = {tensor_name: torch.randn_like(tensor) for tensor_name, tensor in edited.items()}
    torch.autograd.backward(list(edited.values()), list(gradients.values()))
    return {
        "network": name,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "nodes": blocks.nodes,
        "bytes": _status("VmHWM") - before,
        "seconds": time.perf_counter() - began,
    }


def speed(hidden: int, layers: int, repeats: int) -> dict[str, Any]:
    """Forward and backward of the published metanetwork on ResNet-56: factored, and edge by edge."""
    from metaprune.graph import trace
    from metaprune.metanet import PaperMetanet, PaperShape, read_blocks
    from metaprune.metanet.reference import ReferenceMetanet

    torch.manual_seed(0)
    model, inputs = build("cifar_resnet56")
    blocks = read_blocks(trace(model, inputs).to_graph())
    paper = PaperMetanet(PaperShape(hidden=hidden, layers=layers), recompute=False)
    arms = {"factored": paper, "message passing": ReferenceMetanet(paper)}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(repeats + 1):
        for name, arm in arms.items():
            paper.zero_grad()
            began = time.perf_counter()
            sum(tensor.square().sum() for tensor in arm(blocks).values()).backward()
            if number:
                seconds[name].append(time.perf_counter() - began)
    ratio = statistics.median(seconds["message passing"]) / statistics.median(seconds["factored"])
    return {"seconds": seconds, "ratio": ratio, "threads": torch.get_num_threads()}


def _status(entry: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each arm")
    parser.add_argument("--out", type=Path, help="file for the JSON lines; standard output if not given")
    options = parser.parse_args()
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # for the processes below
    spawn = multiprocessing.get_context("spawn")
    lines: list[dict[str, Any]] = []
    for name in NETWORKS:
        with spawn.Pool(1) as pool:
            lines.append(pool.apply(memory, (name, options.hidden, options.layers)))
    sizes = torch.tensor([line["params"] for line in lines], dtype=torch.float64)
    peaks = torch.tensor([line["bytes"] for line in lines], dtype=torch.float64)
    centred = sizes - sizes.mean()
    slope = float((centred * peaks).sum() / centred.square().sum())
    timed = speed(options.hidden, options.layers, options.repeats)
    lines += [{"slope_bytes_per_param": slope, "intercept_mib": float(peaks.mean() - slope * sizes.mean()) / 2**20}]
    lines += [{"speed": timed}]
    stream = options.out.open("w") if options.out else sys.stdout
    for line in lines:
        print(json.dumps({**line, "hidden": options.hidden, "layers": options.layers}), file=stream)
    console = Console(stderr=True, highlight=False)
    for line in lines[: len(NETWORKS)]:
        size, peak = line["params"] / 1e6, line["bytes"] / 2**20
        console.print(f"{line['network']:18} {size:6.2f} M  {peak:8.1f} MiB  {line['seconds']:6.1f} s")
    console.print(
        f"slope {slope:.1f} bytes a parameter; factored is {timed['ratio']:.1f} times as fast as message passing"
    )


if __name__ == "__main__":
    main()
