"""Which node of a file is wrong.

The network is exported anew, and the file runs beside that export, both showing the result of every node. They read
the same inputs, so that whatever stands before the fault gives the same numbers; the first node that does not is named,
with what is wrong with it: another attribute, another weight. Where the new export is the same file, the exporter
itself is wrong: then the results of modules in torch are what nodes are held against.
"""

import difflib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, numpy_helper
from torch import Tensor, nn

from metaprune.errors import MetapruneError
from metaprune.export.example import BATCH, Example
from metaprune.export.numeric import Judge, largest_difference
from metaprune.export.session import Session, open_session
from metaprune.export.to_onnx import Rung, draft, ladder, save
from metaprune.measure.profile import module_of

_SAME = 1e-6  # share of the largest number that two ways to the same result may differ by
_SAMPLES = 4

Values = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Culprit:
    """The first node that does something else than the network.

    Args:
        node: Its name.
        operator: What it does.
        module: Path of the module of the network that it stands for; empty where that is not known.
        reason: What is wrong with it.
        error: How far its result is off, as a share of the largest number in it; None where it cannot be compared.
    """

    node: str
    operator: str
    module: str
    reason: str
    error: float | None

    def __str__(self) -> str:
        home = f" of module {self.module!r}" if self.module else ""
        off = "" if self.error is None else f", off by {self.error:.1e}"
        return f"node {self.node!r} ({self.operator}{home}{off}): {self.reason}"

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def find_culprit(session: Session, judge: Judge, example: Example) -> Culprit | None:
    """The node of a file to look at first, or None where none can be named.

    Args:
        session: The file.
        judge: The network that it should be.
        example: Inputs; the first samples are looked at.
    """
    few = example.head(session.batch or _SAMPLES)
    free = {dim: size for port in session.inputs for dim, size in enumerate(port.shape) if isinstance(size, str)}
    told = replace(few, axes={0: BATCH, **free})
    for rung in _rungs(session, told):
        try:
            network = draft(judge.single, told, rung, session.structure.opset)
        except MetapruneError:
            continue
        with tempfile.TemporaryDirectory(prefix="metaprune-") as folder:
            save(network, Path(folder) / "fresh.onnx")
            fresh = onnx.load(Path(folder) / "fresh.onnx")
        try:
            file, feeds = onnx.load(session.structure.path), session.feeds(few)
            return first_difference(file, fresh, feeds) or _first_module(file, fresh, judge, few, feeds)
        except (MetapruneError, ValueError):  # too large to show every result, or not to be run in pieces
            return None
    return None


def _rungs(session: Session, example: Example) -> list[Rung]:
    """The way that the file says it was exported by, or all of them."""
    rungs = ladder(example)
    return [rung for rung in rungs if rung.name == session.metadata.get("metaprune.rung")] or rungs


def first_difference(file: ModelProto, fresh: ModelProto, feeds: Mapping[str, NDArray[Any]]) -> Culprit | None:
    """The first node of `file` that differs from its counterpart in `fresh`; None where all are the same.

    Args:
        file: The file that is wrong.
        fresh: What it should be, its nodes named after their modules.
        feeds: Inputs by name.
    """
    ours, theirs = list(file.graph.node), list(fresh.graph.node)
    got, wanted = _results(file, feeds), _results(fresh, dict(zip(_inputs(fresh), feeds.values())))
    faint = None
    for node, other in _pairs(ours, theirs):
        if other is None:
            return Culprit(
                node=node.name, operator=node.op_type, module="", reason="the network has no such step here", error=None
            )
        error = max((_off(got[a], wanted[b]) for a, b in zip(node.output, other.output) if a and b), default=0.0)
        if error == 0:
            continue
        found = Culprit(
            node=node.name or node.output[0],
            operator=node.op_type,
            module=module_of(other.name),
            reason=_reason(file, fresh, node, other) or "its result is the first that differs",
            error=None if np.isinf(error) else error,
        )
        if error > _SAME:
            return found
        faint = faint or found
    return faint


def _pairs(ours: Sequence[NodeProto], theirs: Sequence[NodeProto]) -> Iterator[tuple[NodeProto, NodeProto | None]]:
    """Every node of the file with its counterpart, or with None where there is none."""
    own, right = ([node.op_type for node in nodes] for nodes in (ours, theirs))
    matcher = difflib.SequenceMatcher(None, own, right, autojunk=False)
    for kind, begin, end, start, stop in matcher.get_opcodes():
        if kind == "equal":
            yield from zip(ours[begin:end], theirs[start:stop])
        else:  # where the file lacks a step, what comes next shows it
            yield from ((node, None) for node in ours[begin:end])


def _results(model: ModelProto, feeds: Mapping[str, NDArray[Any]]) -> Values:
    """The result of every node, by name."""
    shown = ModelProto()
    shown.CopyFrom(model)
    names = [name for node in model.graph.node for name in node.output if name]
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with tempfile.TemporaryDirectory(prefix="metaprune-") as folder:
        path = Path(folder) / "shown.onnx"
        onnx.save(shown, path)
        return open_session(path, threads=1, optimise=False).run(feeds)


def _inputs(model: ModelProto) -> list[str]:
    weights = {tensor.name for tensor in model.graph.initializer}
    return [port.name for port in model.graph.input if port.name not in weights]


def _off(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest difference as a share of the largest number; infinite for other shapes, types or whole numbers."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    if got.dtype.kind not in "fc":
        return 0.0 if np.array_equal(got, wanted) else float("inf")
    error = largest_difference(got, wanted)
    scale = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0))
    return error / scale if scale else error


def _reason(file: ModelProto, fresh: ModelProto, node: NodeProto, other: NodeProto) -> str:
    """What two nodes of one kind differ in."""
    own, right = ({a.name: onnx.helper.get_attribute_value(a) for a in one.attribute} for one in (node, other))
    for name in sorted({*own, *right}):
        if not _equal(own.get(name), right.get(name)):
            return f"its {name} is {_short(own.get(name))}, and should be {_short(right.get(name))}"
    weights, truths = ({tensor.name: tensor for tensor in one.graph.initializer} for one in (file, fresh))
    for name, true_name in zip(node.input, other.input):
        if name in weights and true_name in truths:
            got, wanted = numpy_helper.to_array(weights[name]), numpy_helper.to_array(truths[true_name])
            if not np.array_equal(got, wanted):
                return f"its weight {name!r} {_change(got, wanted)}"
    return ""


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, onnx.TensorProto) and isinstance(other, onnx.TensorProto):
        return np.array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))
    return bool(one == other)


def _short(value: Any) -> str:
    if value is None:
        return "not given"
    return f"{value:g}" if isinstance(value, float) else str(value)[:60]


def _change(got: NDArray[Any], wanted: NDArray[Any]) -> str:
    if got.shape != wanted.shape:
        return f"has the shape {got.shape}, and should have {wanted.shape}"
    if np.array_equal(np.sort(got, axis=None), np.sort(wanted, axis=None)):
        return "holds the right numbers in another order"
    share = float((got != wanted).mean())
    spread = float(np.std(wanted)) or 1.0
    return (
        f"differs in {share:.0%} of its numbers, by up to {largest_difference(got, wanted) / spread:.1e} of its spread"
    )


def _first_module(
    file: ModelProto, fresh: ModelProto, judge: Judge, example: Example, feeds: Mapping[str, NDArray[Any]]
) -> Culprit | None:
    """The first module whose result in torch is not that of its last node."""
    truths = _module_results(judge.single, example)
    results = _results(file, feeds)
    last = {module_of(other.name): node for node, other in _pairs(file.graph.node, fresh.graph.node) if other}
    for module, node in last.items():
        if module not in truths or truths[module].shape != results[node.output[0]].shape:
            continue
        error = _off(results[node.output[0]], truths[module])
        if error > 100 * _SAME:  # other kernels, other rounding
            reason = "a fresh export gives the same file, so the exporter is wrong about this module"
            return Culprit(node=node.name, operator=node.op_type, module=module, reason=reason, error=error)
    return None


def _module_results(model: nn.Module, example: Example) -> Values:
    """What every module that runs once returns first, by path, in the order of their ends."""
    seen: dict[str, list[Tensor]] = {}

    def hook(path: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if isinstance(first, Tensor):
                seen.setdefault(path, []).append(first.detach())

        return keep

    hooks = [module.register_forward_hook(hook(path)) for path, module in model.named_modules() if path]
    try:
        with torch.no_grad():
            example.call(model)
    finally:
        for handle in hooks:
            handle.remove()
    return {path: results[0].cpu().numpy() for path, results in seen.items() if len(results) == 1}
