"""A small member of each architecture family of timm and torchvision: traced, cut, verified, exported.

Each network gets random weights and statistics (so that a mix-up of units shows), the smallest input that it takes, and
a random cut of 30 % of every free axis. One JSON line a network goes to the output, a table to the terminal; nothing
is asserted. Needs the extra ``timm``; what cannot be imported is a line of its own.

    python benchmarks/timm_families.py [--only REGEX] [--out FILE] [--jobs N] [--limit-s S] [--no-export]
"""

import argparse
import json
import multiprocessing
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

FRACTION = 0.3  # of the units of every free axis, removed
TOLERANCE = 1e-4
PRELOAD = ["torch", "timm", "torchvision", "metaprune", "metaprune.zoo.sources", "metaprune.export.to_onnx"]

# Family by input size, then names; `*` marks networks built for their input size (`img_size`).
_TIMM = {
    64: """
    resnet18 resnext26ts seresnet33ts legacy_seresnet18 ecaresnet26t gcresnext26ts res2net50_14w_8s resnest14d
    skresnet18 resnetv2_18 resnetv2_50x1_bit regnetx_002 regnety_002 regnetz_005 densenet121 rdnet_tiny vgg11_bn dpn48b
    dla34 dla46x_c hrnet_w18_small selecsls42 repvgg_a0 mobileone_s0 gernet_s mobilenetv1_100 mobilenetv2_050
    mobilenetv3_small_050 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium efficientnet_b0 efficientnet_lite0
    efficientnetv2_rw_t tf_efficientnetv2_b0 gc_efficientnetv2_rw_t mixnet_s spnasnet_100 fbnetc_100 fbnetv3_b
    mnasnet_small hardcorenas_a lcnet_035 lcnetv2_small tinynet_e ghostnet_050 ghostnetv2_100 ghostnetv3_050
    repghostnet_050 rexnet_100 cspresnet50 cspdarknet53 darknet17 cs3darknet_s cspnext_tiny vovnet39a
    ese_vovnet19b_slim_dw tresnet_m hgnet_tiny hgnetv2_b0 xception legacy_xception xception41 nf_regnet_b0 nf_resnet26
    dm_nfnet_f0 eca_nfnet_l0 convnext_atto convnextv2_atto convmixer_768_32 inception_next_atto fasternet_t0
    starnet_s050 shvit_s1 mambaout_femto csatv2 cpubone_nano lowformer_b0 iformer_t pvt_v2_b0 poolformer_s12
    convformer_s18 caformer_s18 edgenext_xx_small fastvit_t8 efficientvit_b0 efficientvit_l1 efficientvim_m1
    focalnet_tiny_srf davit_tiny repvit_m0_9
    vit_tiny_patch16_224* vit_relpos_small_patch16_224* vit_srelpos_small_patch16_224* vit_tiny_r_s16_p8_224*
    deit_tiny_patch16_224* deit_tiny_distilled_patch16_224* deit3_small_patch16_224* beit_base_patch16_224*
    vit_base_patch16_rope_224* test_vit* cait_xxs24_224* xcit_nano_12_p16_224* convit_tiny* coat_lite_tiny* coat_tiny*
    pit_ti_224* mobilevit_xxs* mobilevitv2_050* mixer_s32_224* gmixer_12_224* gmlp_ti16_224* resmlp_12_224*
    tnt_s_patch16_224*
    """,
    56: "eva02_tiny_patch14_224*",
    96: "inception_v3 inception_v4 inception_resnet_v2 nasnetalarge pnasnet5large gemma4_vit_167m",
    112: "deepseek_vit_412m",
    128: """
    samvit_base_patch16_224* hiera_tiny_224* sam2_hiera_tiny vitamin_small_224* crossvit_tiny_240
    swin_tiny_patch4_window7_224* swinv2_tiny_window8_256* swinv2_cr_tiny_224* maxvit_rmlp_pico_rw_256*
    maxxvit_rmlp_nano_rw_256* coatnet_pico_rw_224* coatnext_nano_rw_224* twins_pcpvt_small* twins_svt_small*
    mvitv2_tiny* volo_d1_224* levit_128s* levit_conv_128s* visformer_tiny* efficientformerv2_s0* efficientvit_m0*
    swiftformer_xs sequencer2d_s* tiny_vit_5m_224 nextvit_small nest_tiny* gcvit_xxtiny*
    botnet26t_256* lambda_resnet26t* naflexvit_base_patch16_gap* qwen3_vit_88m mobilenetv5_300m
    """,
    224: "efficientformer_l1*",
    256: "bat_resnext26ts* halonet26t*",
}
_TORCHVISION = {
    (64, 64): """
    alexnet squeezenet1_1 mobilenet_v2 mobilenet_v3_small mnasnet0_5 shufflenet_v2_x0_5 resnet18 resnext50_32x4d
    densenet121 efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny googlenet vgg11
    lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large fcn_resnet50
    """,
    (96, 96): "inception_v3",
    (128, 128): "swin_t swin_v2_t",
    (224, 224): "vit_b_32 maxvit_t",
    (8, 64, 64): "r3d_18 mc3_18 r2plus1d_18 swin3d_t",
    (16, 224, 224): "s3d mvit_v2_s",
}


@dataclass(frozen=True)
class Family:
    """One network.

    Args:
        spec: Its name for ``--model``.
        shape: Its example input.
        options: Arguments for its factory.
    """

    spec: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


def families() -> list[Family]:
    """Every network of the tables above."""
    out = []
    for size, names in _TIMM.items():
        for name in names.split():
            options = {"img_size": size} if name.endswith("*") else {}
            out.append(Family(f"timm:{name.rstrip('*')}", (2, 3, size, size), options))
    for shape, names in _TORCHVISION.items():
        out += [Family(f"torchvision:{name}", (2, 3, *shape)) for name in names.split()]
    return out


@dataclass
class Line:
    """What came of one network.

    Attributes:
        spec: Its name.
        shape: Its input.
        status: ``ok``, or the step that failed: ``build``, ``trace``, ``cut``, ``verify``, ``export``, ``time``.
        why: The reason, or empty.
        params: Number of parameters.
        prunable: Share of them in tensors that a free axis reaches.
        axes: Number of axes; free ones in `free`.
        free: Number of axes that may be cut.
        trace_s: Processor seconds for the trace, on one thread.
        cut_s: Likewise for surgery.
        way: ``attributes`` or ``graph``.
        way_why: Why not by attributes.
        kept: Parameters left, as a share.
        error: Slim against masked, as a share of the largest output.
        effect: How far the cut moved the outputs, likewise; near 0 the comparison says nothing.
        export_s: Likewise for the export and its proof.
        export_error: File against slim network, likewise.
        rung: Which way of exporting passed.
    """

    spec: str
    shape: tuple[int, ...]
    status: str = "ok"
    why: str = ""
    params: int = 0
    prunable: float = 0.0
    axes: int = 0
    free: int = 0
    trace_s: float | None = None
    cut_s: float | None = None
    way: str = ""
    way_why: str = ""
    kept: float | None = None
    error: float | None = None
    effect: float | None = None
    export_s: float | None = None
    export_error: float | None = None
    rung: str = ""


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights, biases and statistics that differ from unit to unit, of a size that keeps activations in range."""
    generator = torch.Generator().manual_seed(seed)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in named.items():
            leaf = name.rpartition(".")[2]
            if isinstance(tensor, nn.Parameter) and tensor.ndim > 1:
                fan_in = max(tensor[0].numel(), 1)
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * fan_in**-0.5)
            elif leaf in ("bias", "running_mean"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif isinstance(tensor, nn.Parameter) or leaf == "running_var":
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


def examine(family: Family, folder: Path, *, with_export: bool, line: Line) -> Iterator[Line]:
    """Go through the steps for one network; after each the line so far."""
    import metaprune as mp
    from metaprune.zoo.sources import resolve_model

    line.status = "build"
    source = resolve_model(family.spec, input_shape=family.shape, options=family.options)
    model, inputs = source.module.eval(), source.example_inputs
    assert isinstance(inputs, torch.Tensor)
    randomise(model)
    line.params = sum(parameter.numel() for parameter in model.parameters())
    line.status = "trace"
    yield line
    start = time.process_time()
    net = mp.trace(model, inputs)
    line.trace_s = time.process_time() - start
    line.axes, line.free = len(net.axes), sum(axis.prunable for axis in net.axes)
    reached = {name for axis in net.axes if axis.prunable for name, _ in axis.bindings}
    line.prunable = sum(p.numel() for name, p in model.named_parameters() if name in reached) / line.params
    line.status = "cut"
    yield line
    plan = random_plan(net)
    start = time.process_time()
    made = net.cut(plan)
    line.cut_s, line.way, line.way_why = time.process_time() - start, made.way, made.reason
    line.kept = sum(parameter.numel() for parameter in made.module.parameters()) / line.params
    line.status = "verify"
    yield line
    line.error = net.verify(plan, slim=made.module).max_error
    line.effect = effect(model, made.module, inputs)
    if not line.error <= TOLERANCE:
        line.why = f"differs by {line.error:.3g} of the largest output"
        return
    if with_export:
        from metaprune.export import export

        line.status = "export"
        yield line
        start = time.process_time()
        exported = export(made.module, inputs, folder / "slim.onnx")
        line.export_s, line.rung = time.process_time() - start, exported.rung
        line.export_error = exported.max_error
    line.status = "ok"
    yield line


def random_plan(net: Any) -> Any:
    """A plan that removes units of every free axis at random."""
    from metaprune.edits import Keep
    from metaprune.plans import Plan

    random = np.random.default_rng(0)
    edits = []
    for axis in net.axes:
        if axis.prunable:
            keep = max(1, min(axis.size - 1, round(axis.size * (1 - FRACTION))))
            kept = np.sort(random.choice(axis.size, keep, replace=False))
            edits.append(Keep(axis.name, axis.size, tuple(int(rank) for rank in kept)))
    return Plan(tuple(edits))


@torch.no_grad()
def effect(model: nn.Module, slim: nn.Module, inputs: torch.Tensor) -> float:
    """Largest difference between the outputs of two networks, over the largest output of the first."""
    from metaprune.graph.record import tensors_in

    slim.eval()
    pairs = list(zip(tensors_in(model(inputs)), tensors_in(slim(inputs)), strict=True))
    return max(float((a - b).abs().max()) for a, b in pairs) / max(float(a.abs().max()) for a, _ in pairs)


def _child(family: Family, with_export: bool, sender: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    line = Line(family.spec, family.shape)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for step in examine(family, Path(folder), with_export=with_export, line=line):
                sender.send(step)
        except Exception as error:  # whatever a library raises is a result here
            line.why = f"{type(error).__name__}: {error}"
    sender.send(line)
    sender.send(None)


def run(family: Family, *, limit_s: float, with_export: bool) -> Line:
    """One network in a process of its own, ended at the time limit."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(family, with_export, sender))
    process.start()
    sender.close()
    line, end = Line(family.spec, family.shape, status="build"), time.monotonic() + limit_s
    try:
        while receiver.poll(max(end - time.monotonic(), 0)):
            step = receiver.recv()
            if step is None:
                return line
            line = step
        line.why, line.status = f"took longer than {limit_s:.0f} s in step {line.status}", "time"
    except EOFError:
        process.join()
        line.why = f"the process ended with code {process.exitcode}"
    finally:
        process.join(0 if line.status == "time" else 10)
        process.kill()
        process.join()
    return line


def environment() -> dict[str, Any]:
    """Commit, machine and versions."""
    import importlib.metadata as metadata

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {name: version(name) for name in ("metaprune", "torch", "timm", "torchvision", "onnx", "onnxruntime")}
    return {"commit": commit, "machine": platform.machine(), "device": "cpu", "threads": 1, "versions": versions}


def show(lines: list[Line], *, with_export: bool) -> None:
    """The table, and how many of the networks came how far."""
    table = Table("network", "status", "params", "prunable", "trace s", "way", "error", "exported", "file error")
    for line in lines:
        table.add_row(
            line.spec,
            line.status,
            f"{line.params / 1e6:.1f} M",
            f"{line.prunable:.0%}",
            "" if line.trace_s is None else f"{line.trace_s:.2f}",
            line.way,
            "" if line.error is None else f"{line.error:.1e}",
            line.rung,
            "" if line.export_error is None else f"{line.export_error:.1e}",
        )
    console = Console(stderr=True, width=130, highlight=False)
    console.print(table)
    for line in lines:
        if line.why:
            console.print(f"{line.spec}, {line.status}: {line.why}", markup=False)
    built = [line for line in lines if line.status != "build"]
    reached = {
        "traced": [line for line in built if line.trace_s is not None],
        "pruned and verified": [line for line in built if line.error is not None and line.error <= TOLERANCE],
    }
    if with_export:
        reached["exported"] = [line for line in built if line.export_error is not None]
    for name, those in reached.items():
        console.print(f"{name}: {len(those)} of {len(built)} ({len(those) / max(len(built), 1):.1%})")


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression that the name must contain")
    parser.add_argument("--out", type=Path, help="file for the JSON lines; standard output if not given")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time")
    parser.add_argument("--limit-s", type=float, default=300, help="seconds for one network")
    parser.add_argument("--no-export", action="store_true", help="leave the export out")
    options = parser.parse_args()
    chosen = [family for family in families() if re.search(options.only, family.spec)]
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    where, lines = environment(), []
    stream = options.out.open("w") if options.out else sys.stdout
    with ThreadPoolExecutor(options.jobs) as pool, stream:
        for line in pool.map(
            lambda family: run(family, limit_s=options.limit_s, with_export=not options.no_export), chosen
        ):
            lines.append(line)
            print(json.dumps({**asdict(line), **where}), file=stream, flush=True)
        show(lines, with_export=not options.no_export)


if __name__ == "__main__":
    main()
