"""Small networks of transformers: is each traced, how much of it may shrink, is it cut exactly, exported, generating?

``python -m benchmarks.transformers_models [--attention eager] [--no-export] [--json] [NAME ...]`` prints a row a model.
"""

import argparse
import importlib.metadata
import json
import platform
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaprune.export import export
from metaprune.graph import Network, trace
from tests.graph import oracle
from tests.graph.transformers_models import MODELS, build

COLUMNS = ("model", "traced_s", "share", "error", "way", "export", "generate", "refusal")


def measured(name: str, attention: str, with_export: bool) -> dict[str, Any]:
    """Everything about one model."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"model": name, "attention": attention}
    try:
        dense, inputs = build(MODELS[name], attention)
        start = time.perf_counter()
        net = trace(dense, inputs)
        row["traced_s"] = round(time.perf_counter() - start, 2)
        row["share"], row["frozen"] = round(share(net), 3), frozen(net)
        row["failed_rules"], row["real"] = net._layout.trace.failed_rules, net._layout.trace.real_reason
        plan = oracle.random_plan(net, 0)
        start = time.perf_counter()
        cut = net.cut(plan)
        row["cut_s"] = round(time.perf_counter() - start, 2)
        row["way"], row["reason"] = cut.way, cut.reason
        row["error"] = f"{net.verify(plan, slim=cut.module).max_error:.1e}"
        row["generate"] = generates(cut.module, inputs)
        row["export"] = exported(cut.module, inputs) if with_export else ""
    except Exception as error:
        row["refusal"] = f"{type(error).__name__}: {error}"
    return row


def share(net: Network) -> float:
    """Part of the parameters of which some dimension lies on a prunable axis."""
    free = {binding for axis in net.axes if axis.prunable for binding in axis.bindings}
    sizes = {name: tensor.numel() for name, tensor in net.model.named_parameters()}
    return sum(size for name, size in sizes.items() if any((name, k) in free for k in range(4))) / sum(sizes.values())


def frozen(net: Network) -> list[str]:
    """The largest axes that may not shrink, with the reason."""
    shares = net.shares()
    stuck = [axis for axis in net.axes if not axis.prunable and axis.size > 1]
    stuck.sort(key=lambda axis: -shares[axis.name]["params"])
    return [f"{axis.name}[{axis.size}] {shares[axis.name]['params']:.2f}: {axis.reason}" for axis in stuck[:12]]


def exported(slim: Any, inputs: dict[str, Any]) -> str:
    """The largest error of the ONNX file, or why there is none."""
    for module in slim.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False  # a cache is no output of an ONNX file
    with tempfile.TemporaryDirectory() as folder:
        try:
            return f"{export(slim, inputs, Path(folder) / 'slim.onnx').max_error:.1e}"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:300]}"


def generates(slim: nn.Module, inputs: dict[str, Any]) -> str:
    """How far logits with a cache are from those without; empty where the model does not generate."""
    if not getattr(slim, "can_generate", lambda: False)():
        return ""
    with torch.no_grad():
        return f"{cached_error(slim, inputs):.1e}"


def cached_error(slim: Any, inputs: dict[str, Any]) -> float:
    """Generate greedily with a cache, and compare the scores with those of one run over the whole text."""
    start = {name: tensor for name, tensor in inputs.items() if name != "decoder_input_ids"}
    if "input_ids" in start:
        start["attention_mask"] = torch.ones_like(start["input_ids"])
    steps = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "use_cache": True}
    new = slim.eval().generate(**start, **steps, output_logits=True, return_dict_in_generate=True)
    decodes = slim.config.is_encoder_decoder
    whole = {**(start if decodes else {}), "decoder_input_ids" if decodes else "input_ids": new.sequences}
    logits = slim(**whole, use_cache=False).logits[:, -6:-1]
    return float((logits - torch.stack(new.logits, dim=1)).abs().max() / logits.abs().max())


def main() -> None:
    """Measure the models that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--no-export", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON line a model")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "metaprune")}
    if not given.json:
        print(
            f"{versions} {platform.machine()} attention={given.attention}", "| " + " | ".join(COLUMNS) + " |", sep="\n"
        )
        print("|---" * len(COLUMNS) + "|")
    for name in given.names or MODELS:
        row = measured(name, given.attention, not given.no_export)
        line = json.dumps({**row, **versions}) if given.json else "| " + " | ".join(str(row[k]) for k in COLUMNS) + " |"
        print(line.replace("\n", " "), flush=True)


if __name__ == "__main__":
    main()
