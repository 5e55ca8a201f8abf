"""Is the cut network the masked one?

*Masked* means: the dense network with the removed units' slices of every parameter and buffer set to zero, and where
the statistics of a norm, or a softmax, run over removed units, they run over the kept ones only. Both networks get the
same real inputs; the largest difference over the largest output is the error.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from metaprune.graph.axes import Alive
from metaprune.graph.layout import Layout
from metaprune.graph.rules import find_rule
from metaprune.graph.surgery import like, named_tensors
from metaprune.graph.trace import ExampleInputs, Op, bind, call_arguments, tensors_in
from metaprune.modes import evaluating


@dataclass(frozen=True)
class Verification:
    """How far the cut network is from the masked one.

    Attributes:
        max_error: Largest absolute difference over largest absolute output; no unit.
        scale: Largest absolute output of the masked network.
        samples: Number of inputs compared.
        inputs: Where they came from.
    """

    max_error: float
    scale: float
    samples: int
    inputs: str

    def passed(self, tolerance: float = 1e-5) -> bool:
        """The error is at most `tolerance`."""
        return self.max_error <= tolerance


def compare(
    model: nn.Module,
    slim: nn.Module,
    layout: Layout,
    alive: Alive,
    inputs: ExampleInputs,
    tensors: Mapping[str, Tensor],
    source: str,
) -> Verification:
    """Run the masked dense network and the cut one on the same inputs, in evaluation mode, without gradients."""
    args, kwargs = call_arguments(inputs)
    with torch.no_grad():
        masked = masked_copy(model, layout, alive, tensors).eval()
        with torch._C._AutoDispatchBelowAutograd(), _KeptStatistics(layout, alive):
            wanted = tensors_in(masked(*args, **kwargs))
        with evaluating(slim):
            seen = tensors_in(slim(*args, **kwargs))
    pairs = [(a.double(), b.double()) for a, b in zip(wanted, seen, strict=True) if a.is_floating_point()]
    scale = max((float(a.abs().max()) for a, _ in pairs if a.numel()), default=0.0)
    difference = max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    if any(bool((a.isnan() != b.isnan()).any()) for a, b in pairs):
        difference = float("nan")
    return Verification(difference / scale if scale else difference, scale, len(tensors_in(inputs)[0]), source)


def masked_copy(model: nn.Module, layout: Layout, alive: Alive, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The dense network with the slices of removed units set to zero."""
    originals = named_tensors(model)
    memo: dict[int, Any] = {}
    for name, value in layout.trace.parameters.items():
        original = originals[name]
        data = tensors.get(name, original).detach().to(original.device, original.dtype).clone()
        for k, dim in enumerate(value.dims):
            kept = layout.kept(dim, alive)
            if kept is not None and not kept.all() and (data.is_floating_point() or data.is_complex()):
                data.index_fill_(k, torch.from_numpy((~kept).nonzero()[0]).to(data.device), 0)
        memo[id(original)] = like(original, data)
    return copy.deepcopy(model, memo)


class _KeptStatistics(TorchDispatchMode):
    """Runs the calls of the trace; those whose statistics run over removed positions see the kept ones only."""

    def __init__(self, layout: Layout, alive: Alive) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layout, self.alive = layout, alive
        self.index = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if find_rule(func) is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        op, self.index = self.layout.trace.ops[self.index], self.index + 1
        assert op.name == func._schema.name.removeprefix("aten::"), (op.name, func)
        if not any(self._cut(dim.labels_NK) for dim in op.statistics):
            return func(*args, **kwargs)
        return self._on_kept(op, func, args, kwargs)

    def _cut(self, labels_NK: Any) -> bool:
        return labels_NK is not None and self.layout.count(labels_NK, self.alive) < len(labels_NK)

    def _on_kept(self, op: Op, func: Any, args: Any, kwargs: Any) -> Any:
        """Gather the kept positions of all operands, run the call on them, and put the results back among zeros."""
        arguments = bind(func, args, kwargs)
        numbers = iter(op.inputs)

        def gathered(item: Any) -> Any:
            if isinstance(item, Tensor):
                for k, kept in self._kept_positions(next(numbers)):
                    item = item.index_select(k, kept)
                return item
            return type(item)(map(gathered, item)) if isinstance(item, (list, tuple)) else item

        arguments = {name: gathered(item) for name, item in arguments.items()}
        for (name, entry), size in op.sizes.items():
            left = self.layout.count(size.labels_NK, self.alive)
            if entry is None:
                arguments[name] = left
            else:
                arguments[name] = [left if k == entry else number for k, number in enumerate(arguments[name])]
        out = func(**arguments)
        results = []
        for tensor, number in zip(tensors_in(out), op.outputs):
            for k, kept in self._kept_positions(number):
                shape = list(tensor.shape)
                shape[k] = self.layout.trace.values[number].dims[k].size
                tensor = tensor.new_zeros(shape).index_copy(k, kept, tensor)
            results.append(tensor)
        return results[0] if isinstance(out, Tensor) else type(out)(results)

    def _kept_positions(self, number: int) -> list[tuple[int, Tensor]]:
        positions = []
        for k, dim in enumerate(self.layout.trace.values[number].dims):
            kept = self.layout.kept(dim, self.alive)
            if kept is not None and not kept.all():
                positions.append((k, torch.from_numpy(kept.nonzero()[0])))
        return positions
