"""Calls that move positions: views, permutations, slices, concatenations, padding.

Slices, flips and the like run on the label array as they run on the data; views factor or merge dimensions.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch

from metaprune.graph.axes import Dim, Grid, Labels
from metaprune.graph.dispatch import Call
from metaprune.graph.record import Dims, tensors_in
from metaprune.graph.rules._base import dims_list, fixed, freeze_all, is_zero, output, positive, rule, with_zero


@rule("view", "_unsafe_view", "reshape", "view_copy", "_reshape_alias", "view_as", "reshape_as")
@rule("flatten", "unflatten", "ravel")
def view(call: Call) -> Dims:
    """Dimensions regroup where the products of their sizes agree."""
    out = output(call)
    if "dtype" in call.arguments:
        call.freeze(*call.dims(call["self"]))
        return fixed(out.shape)
    dims = regroup(call, call.dims(call["self"]), list(out.shape))
    for name in ("size", "shape"):
        _count_sizes(call, name, dims)
    if "sizes" in call.arguments:  # unflatten
        _count_sizes(call, "sizes", dims[positive(call["dim"], call["self"].ndim) :])
    return dims


def _count_sizes(call: Call, name: str, dims: Dims) -> None:
    for k, dim in enumerate(dims):
        if call.constants.get((name, k)) != -1:  # -1 follows by itself
            call.counts(name, dim, k)


def regroup(call: Call, dims: Dims, sizes: Sequence[int]) -> Dims:
    """Read `dims` as a tensor of `sizes`."""
    if 0 in sizes:
        call.freeze(*dims)
        return fixed(sizes)
    out: list[Dim] = []
    start = 0
    for stop, group in _groups([dim.size for dim in dims], list(sizes)):
        inside, start = dims[start:stop], stop
        wide = [dim for dim in inside if dim.size != 1]
        wanted = [size for size in group if size != 1]
        if len(wide) == len(wanted) == 1 or not wanted:
            parts = wide
        else:
            merged = call.units.merge(wide)
            undecided = len(wanted) > 1 and merged.labels_NK is not None
            parts = Grid(merged, wanted, call.where).dims() if undecided else call.split(merged, wanted)
        rest = iter(parts)
        out.extend(next(rest) if size != 1 else Dim(1) for size in group)
    return tuple(out)


def _groups(old: list[int], new: list[int]) -> list[tuple[int, list[int]]]:
    """Cut two shapes where their running products meet: (end in the old shape, sizes of the new one)."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        begin, left, right = j, 1, 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        # Trailing sizes of 1 belong to the last group.
        if prod(old[i:]) == 1 and prod(new[j:]) == 1:
            i, j = len(old), len(new)
        groups.append((i, new[begin:j]))
    return groups


@rule("squeeze", "squeeze_copy")
def squeeze(call: Call) -> Dims:
    dims = call.dims(call["self"])
    chosen = dims_list(call.get("dim"), len(dims))
    return tuple(dim for k, dim in enumerate(dims) if not (k in chosen and dim.size == 1))


@rule("unsqueeze", "unsqueeze_copy")
def unsqueeze(call: Call) -> Dims:
    dims = call.dims(call["self"])
    at = positive(call["dim"], len(dims) + 1)
    return (*dims[:at], Dim(1), *dims[at:])


@rule("permute", "permute_copy")
def permute(call: Call) -> Dims:
    dims = call.undecided_dims(call["self"])
    return tuple(dims[k] for k in dims_list(call["dims"], len(dims)))


@rule("transpose", "swapaxes", "swapdims")
def transpose(call: Call) -> Dims:
    dims = list(call.undecided_dims(call["self"]))
    first, second = (item for name, item in call.arguments.items() if name != "self")
    dims[first], dims[second] = dims[second], dims[first]
    return tuple(dims)


@rule("t", "mT")
def t(call: Call) -> Dims:
    dims = call.dims(call["self"])
    return (*dims[:-2], *dims[:-3:-1])


@rule("numpy_T")
def numpy_t(call: Call) -> Dims:
    return call.dims(call["self"])[::-1]


@rule("expand", "expand_copy", "expand_as", "broadcast_to")
def expand(call: Call) -> Dims:
    """A dimension of size 1 becomes copies, which are units of their own until they meet others."""
    dims, shape = call.dims(call["self"]), output(call).shape
    dims = (*(Dim(1) for _ in range(len(shape) - len(dims))), *dims)
    out = tuple(dim if dim.size == size else call.units.dim(size, zero=False) for dim, size in zip(dims, shape))
    _count_sizes(call, "size", out)
    return out


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Dims:
    parts = [call.dims(tensor) for tensor in call["tensors"] if tensor.shape != (0,)]
    at = positive(call["dim"], len(parts[0]))
    return tuple(
        call.units.concat([part[k] for part in parts]) if k == at else _meet(call, [part[k] for part in parts])
        for k in range(len(parts[0]))
    )


def _meet(call: Call, dims: Sequence[Dim]) -> Dim:
    """Tensors side by side: masked entries are zero if they are in all of them."""
    return with_zero(call.unify(*dims), all(map(is_zero, dims)))


@rule("stack")
def stack(call: Call) -> Dims:
    parts = [call.dims(tensor) for tensor in call["tensors"]]
    at = positive(call["dim"], len(parts[0]) + 1)
    joined = [_meet(call, [part[k] for part in parts]) for k in range(len(parts[0]))]
    return (*joined[:at], Dim(len(parts)), *joined[at:])


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "split_copy", "split_with_sizes_copy")
def split(call: Call) -> list[Dims]:
    dims = call.dims(call["self"])
    at = positive(call["dim"], len(dims))
    # However the parts were asked for, what counts is how large each of them is.
    call.op.name = "split"
    call.constants.pop(("split_size", None), None)
    call.constants["dim", None] = at
    out, start = [], 0
    for k, tensor in enumerate(tensors_in(call.out)):
        size = tensor.shape[at]
        call.constants["split_sizes", k] = size
        call.counts("split_sizes", _rows(dims[at], start, start + size), k)
        out.append((*dims[:at], _slice(call, dims[at], start, start + size), *dims[at + 1 :]))
        start += size
    return out


@rule("unbind", "unbind_copy")
def unbind(call: Call) -> list[Dims]:
    at = positive(call["dim"], call["self"].ndim)
    parts = [_part(call, at, index) for index in range(len(tensors_in(call.out)))]
    if all(part is not None for part in parts):
        return [part for part in parts if part is not None]
    dims = call.dims(call["self"])
    call.freeze(dims[at], reason=f"taken apart one by one in {call.where}")
    return [(*dims[:at], *dims[at + 1 :])] * len(tensors_in(call.out))


def _part(call: Call, at: int, index: int) -> Dims | None:
    """One part of a tensor along a direction of an undecided grid; None where there is none."""
    dims = call.undecided_dims(call["self"])
    grid = dims[at].grid
    if grid is None:
        return None
    rest = grid.pick(dims[at].place, index)
    if rest is None:
        return None
    places = [k for k in range(len(grid.sizes)) if k != dims[at].place]
    return tuple(rest[places.index(dim.place)] if dim.grid is grid else dim for k, dim in enumerate(dims) if k != at)


@rule("select", "select_copy")
def select(call: Call) -> Dims:
    at = positive(call["dim"], call["self"].ndim)
    part = _part(call, at, positive(call["index"], call["self"].shape[at]))
    if part is not None:
        return part
    dims = call.dims(call["self"])
    index = call["index"]
    here = positive(index, dims[at].size)
    picked = _rows(dims[at], here, here + 1)
    call.units.freeze(picked, f"a single position is picked in {call.where}")
    call.counts("index", _rows(dims[at], 0, here) if index >= 0 else _rows(dims[at], here, dims[at].size))
    return (*dims[:at], *dims[at + 1 :])


@rule("slice", "slice_copy")
def slice_(call: Call) -> Dims:
    dims = list(call.dims(call["self"]))
    at = positive(call["dim"], len(dims))
    dim, step = dims[at], call["step"]
    start, stop, _ = slice(call["start"], call["end"]).indices(dim.size)
    if step != 1 and dim.labels_NK is not None:
        dims[at] = _strided(call, dim, start, stop, step)
        return tuple(dims)
    if step != 1:
        dims[at] = Dim(len(range(start, stop, step)), note=dim.note)
        return tuple(dims)
    for name, position in (("start", start), ("end", stop)):
        call.constants[name, None] = position
        call.counts(name, _rows(dim, 0, position))
    dims[at] = _slice(call, dim, start, stop)
    return tuple(dims)


def _strided(call: Call, dim: Dim, start: int, stop: int, step: int) -> Dim:
    """Every `step`-th position: blocks of `step` leave together, or nothing does."""
    if dim.size % step == 0 and start < step and len(range(start, stop, step)) == dim.size // step:
        outer, inner = call.split(dim, [dim.size // step, step])
        call.freeze(inner, reason=f"every {step}th position is picked in {call.where}")
        return outer
    call.freeze(dim)
    return Dim(len(range(start, stop, step)))


@rule("flip")
def flip(call: Call) -> Dims:
    dims = call.dims(call["self"])
    chosen = dims_list(call["dims"], len(dims))
    return tuple(
        call.units.take(dim, np.arange(dim.size)[::-1], call.where) if k in chosen else dim
        for k, dim in enumerate(dims)
    )


@rule("roll")
def roll(call: Call) -> Dims:
    dims = list(call.dims(call["self"]))
    if not call["dims"]:
        call.freeze(*dims)
        return fixed(output(call).shape)
    for k, (shift, at) in enumerate(zip(call["shifts"], dims_list(call["dims"], len(dims)))):
        dim = dims[at]
        if not 0 <= shift <= dim.size:
            shift %= dim.size
        call.constants["shifts", k] = shift
        call.counts("shifts", _rows(dim, dim.size - shift, dim.size), k)
        dims[at] = call.units.take(dim, np.roll(np.arange(dim.size), shift), call.where)
    return tuple(dims)


@rule("repeat")
def repeat(call: Call) -> Dims:
    dims, repeats = call.dims(call["self"]), call["repeats"]
    dims = (*(Dim(1) for _ in range(len(repeats) - len(dims))), *dims)
    out = []
    for k, (dim, times) in enumerate(zip(dims, repeats)):
        copies = call.units.dim(times, zero=False)
        call.counts("repeats", copies, k)
        out.append(call.units.merge([copies, dim]))
    return tuple(out)


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Dims:
    if not isinstance(call.get("repeats"), int) or call.get("dim") is None:
        freeze_all(call)
        return fixed(output(call).shape)
    dims = list(call.dims(call["self"]))
    at = positive(call["dim"], len(dims))
    copies = call.units.dim(call["repeats"], zero=False)
    call.counts("repeats", copies)
    dims[at] = call.units.merge([dims[at], copies])
    call.counts("output_size", dims[at])
    return tuple(dims)


@rule("constant_pad_nd", "pad")
def pad(call: Call) -> Dims:
    """Constant padding of a labelled dimension makes units that are constant; negative padding cuts."""
    dims, amounts = list(call.dims(call["self"])), call["pad"]
    constant = call.get("mode", "constant") == "constant"
    zero = not call.get("value")
    for k in range(len(amounts) // 2):
        at, (front, back) = len(dims) - 1 - k, amounts[2 * k : 2 * k + 2]
        dim = dims[at]
        if front == back == 0:
            continue
        if not constant or dim.labels_NK is None:
            call.freeze(dim)
            dims[at] = Dim(dim.size + front + back, note=dim.note)
            continue
        inner = _slice(call, dim, max(-front, 0), dim.size - max(-back, 0))
        sides = []
        for side, amount, cut in ((0, front, _rows(dim, 0, -front)), (1, back, _rows(dim, dim.size + back, dim.size))):
            call.counts("pad", cut, 2 * k + side) if amount < 0 else None
            sides.append(Dim(max(amount, 0), call.units.fresh(amount) if amount > 0 else None, zero))
            call.counts("pad", sides[-1], 2 * k + side) if amount > 0 else None
        dims[at] = call.units.concat([side for side in (sides[0], inner, sides[1]) if side.size])
    padded = {len(dims) - 1 - k // 2 for k, amount in enumerate(amounts) if amount > 0}
    if padded and not zero:
        dims = [dim if {k} == padded else with_zero(dim, False) for k, dim in enumerate(dims)]
    return tuple(dims)


@rule("pixel_shuffle")
def pixel_shuffle(call: Call) -> Dims:
    """(N, C r r, H, W) -> (N, C, r H, r W): the blocks of r r channels leave together."""
    *batch, channels, _, _ = call.dims(call["self"])
    factor, out = call["upscale_factor"], output(call)
    channel, *block = call.split(channels, [channels.size // factor**2, factor, factor])
    call.freeze(*block, reason=f"channels become pixels in {call.where}")
    return (*batch, channel, *fixed(out.shape[-2:]))


@rule("pixel_unshuffle")
def pixel_unshuffle(call: Call) -> Dims:
    """(N, C, r H, r W) -> (N, C r r, H, W)."""
    *batch, channel, _, _ = call.dims(call["self"])
    factor, out = call["downscale_factor"], output(call)
    return (*batch, call.units.merge([channel, Dim(factor**2)]), *fixed(out.shape[-2:]))


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(call: Call) -> Dims:
    """(N, g c, ...) -> (N, c g, ...)."""
    batch, channels, *rest = call.dims(call["self"])
    group, channel = call.split(channels, [call["groups"], channels.size // call["groups"]])
    call.counts("groups", group)
    return (batch, call.units.merge([channel, group]), *rest)


@rule("unfold")
def unfold(call: Call) -> Dims:
    """Sliding windows along one dimension, which must then stay."""
    dims, out = list(call.dims(call["self"])), output(call)
    at = positive(call["dimension"], len(dims))
    call.freeze(dims[at])
    dims[at] = Dim(out.shape[at])
    return (*dims, Dim(out.shape[-1]))


@rule("im2col")
def im2col(call: Call) -> Dims:
    """(N, C, H, W) -> (N, C k k, L)."""
    *batch, channel, _, _ = call.dims(call["self"])
    out = output(call)
    return (*batch, call.units.merge([channel, Dim(out.shape[-2] // channel.size)]), Dim(out.shape[-1]))


@rule("col2im")
def col2im(call: Call) -> Dims:
    """(N, C k k, L) -> (N, C, H, W)."""
    *batch, columns, _ = call.dims(call["self"])
    out = output(call)
    channel, window = call.split(columns, [out.shape[-3], columns.size // out.shape[-3]])
    call.freeze(window, reason=f"kernel positions in {call.where}")
    return (*batch, channel, *fixed(out.shape[-2:]))


@rule("tril", "triu")
def triangle(call: Call) -> Dims:
    dims = call.dims(call["self"])
    call.freeze(*dims[-2:])
    return dims


@rule("block_diag")
def block_diag(call: Call) -> Dims:
    """Matrices along the diagonal: their rows end to end, and their columns."""
    matrices = [call.dims(tensor) for tensor in call["tensors"]]
    if any(len(dims) != 2 for dims in matrices):
        freeze_all(call)
        return fixed(output(call).shape)
    rows, columns = zip(*matrices)
    return call.units.concat(rows), call.units.concat(columns)


@rule("view_as_real", "view_as_complex")
def complex_view(call: Call) -> Dims:
    dims, out = call.dims(call["self"]), output(call)
    if torch.is_complex(out):
        call.freeze(dims[-1])
        return dims[:-1]
    return (*dims, Dim(2))


@rule("diag_embed")
def diag_embed(call: Call) -> Dims:
    """(..., N) -> (..., N, N): rows and columns are the same units."""
    dims = call.dims(call["self"])
    if call["offset"] or (call["dim1"], call["dim2"]) != (-2, -1):
        freeze_all(call)
        return fixed(output(call).shape)
    return (*dims, dims[-1])


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def fourier(call: Call) -> Dims:
    """A linear map along `dim`, which must stay; other dimensions pass."""
    dims, out = list(call.dims(call["self"])), output(call)
    for at in dims_list(call["dim"], len(dims)):
        call.freeze(dims[at])
        dims[at] = Dim(out.shape[at])
    return tuple(dims)


def _rows(dim: Dim, start: int, stop: int) -> Labels | None:
    return None if dim.labels_NK is None else dim.labels_NK[start:stop]


def _slice(call: Call, dim: Dim, start: int, stop: int) -> Dim:
    if start == 0 and stop == dim.size:
        return dim
    if stop <= start:
        return Dim(0)
    return call.units.take(dim, np.arange(start, stop), call.where)
