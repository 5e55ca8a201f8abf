"""Calls that are linear in what they read, as matrices: convolutions (also grouped), linear layers, matrix products.

Array suffixes: B rows (one for each sample and place of the output), G groups, D inputs of one output in a group
(channel by channel, kernel positions inside), O outputs of a group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metaprune.graph.layout import Layout
from metaprune.graph.record import Op, Ref, Trace, Value, refs_in

_ARGUMENTS = {  # input, weight and bias of each, by the names of the schema
    "linear": ("input", "weight", "bias"),
    "addmm": ("mat1", "mat2", "self"),
    "mm": ("self", "mat2", ""),
    "matmul": ("self", "other", ""),
    "conv1d": ("input", "weight", "bias"),
    "conv2d": ("input", "weight", "bias"),
    "conv3d": ("input", "weight", "bias"),
    "convolution": ("input", "weight", "bias"),
}


@dataclass(frozen=True, eq=False)
class Norm:
    """A BatchNorm with running statistics, by the names of its tensors.

    Attributes:
        op: The call.
        mean: Its running mean.
        var: Its running variance.
        weight: Its weight, or empty.
        eps: What is added to the variance.
    """

    op: Op
    mean: str
    var: str
    weight: str
    eps: float

    def scale(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """What it multiplies each channel by, shape (C,)."""
        scale_C = (tensors[self.var].detach() + self.eps).rsqrt()
        return scale_C * tensors[self.weight].detach() if self.weight else scale_C


@dataclass(frozen=True, eq=False)
class LinearCall:
    """One call ``y = x W + b`` whose weight is a parameter that nothing else reads.

    Attributes:
        op: The call.
        weight: Name of the parameter.
        bias: Name of the bias, or empty where there is none that is a parameter of its own.
        norm: The BatchNorm that alone reads its result, in evaluation mode; or None.
        intercept: What can take a change of the mean of the result: the running mean of the norm, else the bias; empty
            where there is neither.
        x: What it reads.
        y: What it gives.
    """

    op: Op
    weight: str
    bias: str
    norm: Norm | None
    intercept: str
    x: Value
    y: Value

    @property
    def spatial(self) -> int:
        """Dimensions that a kernel slides over."""
        return len(self.y.dims) - 2 if "conv" in self.op.name else 0

    @property
    def channels(self) -> int:
        """The dimension of input and output that is multiplied and made."""
        return 1 if self.spatial else -1

    def input(self, arguments: Mapping[str, Any]) -> Tensor:
        """What the call reads, of its arguments by name."""
        tensor: Tensor = arguments[_ARGUMENTS[self.op.name][0]]
        return tensor

    def rows(self, arguments: Mapping[str, Any], chosen: Tensor | None = None) -> Tensor:
        """What each output is a weighted sum of, shape (G, B, D).

        Args:
            arguments: Of the call, by name.
            chosen: Which rows, by number; all if None.
        """
        x_ = self.input(arguments)
        if not self.spatial:
            rows_BD = x_.reshape(-1, x_.shape[-1])
            return _wide(rows_BD if chosen is None else rows_BD[chosen])[None]
        groups = int(arguments["groups"])
        cells_BKC = self._cells(x_, arguments, chosen)
        return _wide(cells_BKC.transpose(1, 2).reshape(len(cells_BKC), groups, -1).transpose(0, 1))

    def _cells(self, x_: Tensor, arguments: Mapping[str, Any], chosen: Tensor | None) -> Tensor:
        """What the kernel lies on, row by row: shape (B, kernel positions, channels)."""
        kernel = arguments["weight"].shape[2:]
        step, dilation = (_each(arguments[name], self.spatial) for name in ("stride", "dilation"))
        pads = _padding(arguments["padding"], kernel, dilation)
        padded = F.pad(x_, [side for pair in reversed(pads) for side in pair])
        sizes = padded.shape[2:]
        counts = [(size - d * (k - 1) - 1) // s + 1 for size, k, d, s in zip(sizes, kernel, dilation, step)]
        starts = _places(counts, step, sizes).to(x_.device)
        offsets = _places(kernel, dilation, sizes).to(x_.device)
        rows = torch.arange(len(padded) * len(starts), device=x_.device) if chosen is None else chosen
        first_B = rows // len(starts) * sizes.numel() + starts[rows % len(starts)]
        return padded.movedim(1, -1).reshape(-1, padded.shape[1])[first_B[:, None] + offsets]

    def outputs(self, y: Tensor, groups: int = 1, chosen: Tensor | None = None) -> Tensor:
        """What the call gave, or something of its shape, in the order of :meth:`rows`, shape (G, B, O)."""
        flat = y.flatten(2).transpose(1, 2) if self.spatial else y
        rows = flat.reshape(-1, flat.shape[-1])
        picked = rows if chosen is None else rows[chosen]
        return _wide(picked.reshape(len(picked), groups, -1).transpose(0, 1))

    def count(self, y: Tensor) -> int:
        """Number of rows in an output."""
        return y.numel() // y.shape[self.channels]

    def matrix(self, weight: Tensor, groups: int = 1) -> Tensor:
        """The weight as shape (G, D, O)."""
        if self.spatial:
            return weight.reshape(groups, weight.shape[0] // groups, -1).transpose(1, 2)
        return (weight.T if self.op.name == "linear" else weight)[None]

    def weight_of(self, matrix_GDO: Tensor, shape: torch.Size) -> Tensor:
        """The weight that has this matrix."""
        if self.spatial:
            return matrix_GDO.transpose(1, 2).reshape(shape)
        return matrix_GDO[0].T if self.op.name == "linear" else matrix_GDO[0]


def linear_calls(layout: Layout) -> Iterator[LinearCall]:
    """Every call of the network that is one, in order. Weights that are read twice, or tied, are left out."""
    trace = layout.trace
    own, readers = own_parameters(trace), find_readers(trace)
    names = {value.index: name for name, value in trace.parameters.items()}
    for op in trace.ops:
        if op.name not in _ARGUMENTS:
            continue
        x, weight, bias = (op.arguments.get(name) for name in _ARGUMENTS[op.name])
        if not isinstance(x, Ref) or not isinstance(weight, Ref) or weight.number not in own:
            continue
        value, y = trace.values[x.number], trace.values[op.outputs[0]]
        rank = len(y.dims) if "conv" in op.name else 2  # a convolution without batch dimension is left out
        if len(trace.values[weight.number].dims) != rank or len(value.dims) != len(y.dims) or not _plain(op):
            continue
        named = own.get(bias.number, "") if isinstance(bias, Ref) else ""
        norm = _norm(readers[y.index], names)
        yield LinearCall(op, own[weight.number], named, norm, norm.mean if norm else named, value, y)


Reader = tuple[Op, str]  # a call, and as which argument it reads a value


def find_readers(trace: Trace) -> dict[int, list[Reader]]:
    """By value: the calls that read it. What the network returns is read from outside, too: it has no single reader."""
    readers: dict[int, list[Reader]] = {value.index: [] for value in trace.values}
    for op in trace.ops:
        for argument, item in op.arguments.items():
            for number in refs_in(item):
                readers[number].append((op, argument))
    for number in trace.outputs:
        readers[number] += [(trace.ops[-1], "")] * 2
    return readers


def _norm(readers: list[Reader], names: Mapping[int, str]) -> Norm | None:
    """The BatchNorm that alone reads a value."""
    if len(readers) != 1 or readers[0][0].name != "batch_norm" or readers[0][1] != "input":
        return None
    op = readers[0][0]
    refs = [op.arguments[name] for name in ("running_mean", "running_var", "weight")]
    mean, var, weight = (names.get(ref.number, "") if isinstance(ref, Ref) else "" for ref in refs)
    return Norm(op, mean, var, weight, float(op.constants["eps", None])) if mean and var else None


def _plain(op: Op) -> bool:
    """Not transposed, and nothing is scaled."""
    scaled = any(op.constants.get((name, None), 1) != 1 for name in ("alpha", "beta"))
    return not scaled and not op.constants.get(("transposed", None), False)


def own_parameters(trace: Trace) -> dict[int, str]:
    """Parameters that one call alone reads, under one name."""
    tied = set(trace.aliases.values())
    users: dict[int, int] = {}
    for op in trace.ops:
        for number in op.inputs:
            users[number] = users.get(number, 0) + 1
    return {
        value.index: name
        for name, value in trace.parameters.items()
        if value.parameter and name not in tied and users.get(value.index) == 1
    }


def _wide(values: Tensor) -> Tensor:
    """The values, those in half precision as float32."""
    return values.float() if values.dtype.itemsize < 4 else values


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """What is added before and after, by dimension."""
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        return [(t // 2, t - t // 2) for t in total]
    return [(p, p) for p in _each(0 if padding == "valid" else padding, len(kernel))]


def _places(counts: Sequence[int], step: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Numbers of the cells at `0, step, 2 * step ...` along each dimension of a flattened map.

    >>> _places([2, 2], [2, 1], [4, 5]).tolist()
    [0, 1, 10, 11]
    """
    places = torch.zeros(1, dtype=torch.long)
    for count, each, size in zip(counts, step, sizes):
        places = (places[:, None] * size + torch.arange(count) * each).flatten()
    return places


def _each(item: Any, count: int) -> list[int]:
    """One number a dimension."""
    numbers = list(item) if isinstance(item, (list, tuple)) else [item]
    return numbers * count if len(numbers) == 1 else numbers


def damped_factor(xx_GDD: Tensor, ridge: float) -> Tensor:
    """Cholesky factor with `ridge` times the mean of the diagonal added to it, or more where rounding asks for it."""
    mean_G11 = xx_GDD.diagonal(dim1=1, dim2=2).mean(1)[:, None, None].clamp_min(1e-30)
    eye_DD = torch.eye(xx_GDD.shape[-1], dtype=xx_GDD.dtype, device=xx_GDD.device)
    while True:
        factor_GDD, failed_G = torch.linalg.cholesky_ex(xx_GDD + ridge * mean_G11 * eye_DD)
        if not bool(failed_G.any()):
            return factor_GDD
        ridge *= 10
