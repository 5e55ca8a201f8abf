"""Small networks of transformers: is each traced, how much of it may shrink, is it cut exactly, exported, generating?

``python -m benchmarks.transformers_models [--attention eager] [--no-export] [NAME ...]`` prints one JSON line a model.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metaprune.graph import Network, trace
from tests.graph import oracle
from tests.graph.transformers_models import MODELS, build


def measured(name: str, attention: str, export: bool) -> dict[str, Any]:
    """Everything about one model."""
    row: dict[str, Any] = {"model": name, "attention": attention}
    try:
        dense, inputs = build(MODELS[name], attention)
        start = time.perf_counter()
        net = trace(dense, inputs)
        row["traced_s"] = round(time.perf_counter() - start, 2)
        row["ops"], row["axes"] = len(net._layout.trace.ops), len(net.axes)
        row["real"] = net._layout.trace.real_reason
        row["failed_rules"] = net._layout.trace.failed_rules
        row["share"] = round(share(net), 3)
        row["frozen"] = frozen(net)
        plan = oracle.random_plan(net, 0)
        start = time.perf_counter()
        cut = net.cut(plan)
        row["cut_s"] = round(time.perf_counter() - start, 2)
        row["way"], row["reason"] = cut.way, cut.reason[:300]
        row["error"] = net.verify(plan, slim=cut.module).max_error
        row["export"] = exported(cut.module, inputs) if export else ""
        row["generate"] = generates(cut.module, inputs)
    except Exception as error:
        row["stopped"] = f"{type(error).__name__}: {str(error)[:600]}"
    return row


def share(net: Network) -> float:
    """Part of the parameters with a prunable axis among their dimensions."""
    trace, layout = net._layout.trace, net._layout
    free = total = 0.0
    for value in trace.parameters.values():
        if not value.parameter:
            continue
        fixed, size = 1.0, 1
        for dim in value.dims:
            size *= dim.size
            rows = layout.resolve(dim)
            if rows is not None:
                owners = layout.axis_of[rows]
                loose = [axis for axis in range(len(net.axes)) if net.axes[axis].prunable]
                import numpy as np

                fixed *= 1 - float(np.isin(owners, loose).any(axis=1).mean())
        free, total = free + size * (1 - fixed), total + size
    return free / max(total, 1)


def frozen(net: Network) -> list[str]:
    """The largest axes that may not shrink, with the reason."""
    shares = net.shares()
    stuck = [axis for axis in net.axes if not axis.prunable and axis.size > 1]
    stuck.sort(key=lambda axis: -shares[axis.name]["params"])
    return [f"{axis.name}[{axis.size}] {shares[axis.name]['params']:.2f}: {axis.reason}" for axis in stuck[:12]]


def exported(slim: nn.Module, inputs: dict[str, Any]) -> str:
    """The largest error of the ONNX file, or why there is none."""
    from metaprune.export import export

    with tempfile.TemporaryDirectory() as folder:
        try:
            return f"{export(slim, inputs, Path(folder) / 'slim.onnx').max_error:.1e}"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:400]}"


def generates(slim: nn.Module, inputs: dict[str, Any]) -> str:
    """How far logits with a cache are from those without; empty where the model does not generate."""
    if not getattr(slim, "can_generate", lambda: False)():
        return ""
    with torch.no_grad():
        return f"{cached_error(slim, inputs):.1e}"


def cached_error(slim: Any, inputs: dict[str, Any]) -> float:
    """Generate greedily with a cache, and compare the scores with those of one run over the whole text."""
    slim = slim.eval()
    start = {name: tensor for name, tensor in inputs.items() if name != "decoder_input_ids"}
    new = slim.generate(
        **start,
        use_cache=True,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    whole = dict(start)
    whole["decoder_input_ids" if slim.config.is_encoder_decoder else "input_ids"] = new.sequences
    logits = slim(**whole, use_cache=False).logits[:, -6:-1]
    cached = torch.stack(new.logits, dim=1)[:, -5:]
    return float((logits - cached).abs().max() / logits.abs().max())


def main() -> None:
    """Measure the models that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--no-export", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in given.names or MODELS:
        print(json.dumps(measured(name, given.attention, not given.no_export)), flush=True)


if __name__ == "__main__":
    main()
