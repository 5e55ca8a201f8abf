"""Matrix products of every kind: one contraction over named dimensions."""

from collections.abc import Sequence

from torch import Tensor

from metaprune.graph.axes import Dim
from metaprune.graph.dispatch import Call
from metaprune.graph.record import Dims
from metaprune.graph.rules._base import fixed, freeze_all, is_zero, output, rule, with_zero


def contract(call: Call, operands: Sequence[Tensor], terms: Sequence[str], result: str) -> Dims:
    """Einstein summation over labels: equal letters meet, letters missing from the result are summed over."""
    letters: dict[str, list[Dim]] = {}
    for tensor, term in zip(operands, terms, strict=True):
        for k, (dim, letter) in enumerate(zip(call.dims(tensor), term, strict=True)):
            letters.setdefault(letter, []).append(dim)
            if letter not in result:
                call.consumes(tensor, k)
    joined: dict[str, Dim] = {}
    for letter, met in letters.items():
        dim = call.unify(*met)
        # A product is zero where any factor is; a letter that one operand lacks broadcasts over it.
        joined[letter] = with_zero(dim, any(part.zero and part.labels_NK is not None for part in met))
        if letter not in result:
            call.sum_over(joined[letter])
    _count(call, joined, terms, result)
    return tuple(joined[letter] for letter in result)


def _count(call: Call, joined: dict[str, Dim], terms: Sequence[str], result: str) -> None:
    """Operands are multiplied in from left to right; a letter is summed over once nothing else needs it.

    What one operand alone has is summed over before, and a product that sums over nothing is pointwise.
    """
    running: set[str] = set()
    for k, term in enumerate(terms):
        later = set(result).union(*terms[k + 1 :])
        summed = (running & set(term)) - later
        running |= {letter for letter in term if letter in later or letter in running}
        if call.op.name == "einsum":
            summed = {letter for letter in summed if joined[letter].size > 1}
        if summed:
            call.macs(*(dim for letter, dim in joined.items() if letter in running))
        running &= later


def _add(call: Call, product: Dims, addend: Dims) -> Dims:
    """A bias that broadcasts over a product."""
    out = list(product)
    for back in range(1, len(product) + 1):
        bias = addend[-back] if back <= len(addend) else Dim(1)
        joined = call.unify(product[-back], bias)
        out[-back] = with_zero(joined, product[-back].zero and bias.zero and bias.labels_NK is not None)
    return tuple(out)


@rule("linear")
def linear(call: Call) -> Dims:
    x, weight = call["input"], call["weight"]
    batch = "abcdefgh"[: x.ndim - 1]
    if weight.ndim == 1:
        return contract(call, [x, weight], [batch + "i", "i"], batch)
    out = contract(call, [x, weight], [batch + "i", "oi"], batch + "o")
    return out if call["bias"] is None else _add(call, out, call.dims(call["bias"]))


@rule("mm")
def mm(call: Call) -> Dims:
    return contract(call, [call["self"], call["mat2"]], ["ik", "ko"], "io")


@rule("bmm")
def bmm(call: Call) -> Dims:
    return contract(call, [call["self"], call["mat2"]], ["bik", "bko"], "bio")


@rule("addmm")
def addmm(call: Call) -> Dims:
    product = contract(call, [call["mat1"], call["mat2"]], ["ik", "ko"], "io")
    return _add(call, product, call.dims(call["self"]))


@rule("baddbmm")
def baddbmm(call: Call) -> Dims:
    product = contract(call, [call["batch1"], call["batch2"]], ["bik", "bko"], "bio")
    return _add(call, product, call.dims(call["self"]))


@rule("matmul")
def matmul(call: Call) -> Dims:
    left, right = call["self"], call["other"]
    rank = max(left.ndim, right.ndim, 2) - 2
    batch = "abcdefgh"[:rank]

    def term(tensor: Tensor, matrix: str) -> str:
        return batch[rank - (tensor.ndim - 2) :] + matrix if tensor.ndim > 1 else "k"

    result = batch + ("" if left.ndim == 1 else "i") + ("" if right.ndim == 1 else "o")
    return contract(call, [left, right], [term(left, "ik"), term(right, "ko")], result)


@rule("_grouped_mm")
def grouped_mm(call: Call) -> Dims:
    """x (S, I) in groups of rows that end at `offs` (E,), weight (E, I, O) -> (S, O): each group has its own weight."""
    x, weight = call["self"], call["mat2"]
    if x.ndim != 2 or weight.ndim != 3 or call.get("bias") is not None:
        freeze_all(call)
        return fixed(output(call).shape)
    call.freeze(
        call.dims(x)[0], call.dims(weight)[0], *call.dims(call["offs"]), reason=f"grouped by value in {call.where}"
    )
    inner, made = call.dims(weight)[1:]
    inner = with_zero(call.unify(call.dims(x)[1], inner), is_zero(call.dims(x)[1]) or is_zero(inner))
    call.sum_over(inner)
    call.consumes(x, 1)
    call.consumes(weight, 1)
    call.macs(call.dims(x)[0], inner, made)
    return (with_zero(call.dims(x)[0], False), made)


@rule("mv")
def mv(call: Call) -> Dims:
    return contract(call, [call["self"], call["vec"]], ["ik", "k"], "i")


@rule("dot", "vdot")
def dot(call: Call) -> Dims:
    right = next(item for name, item in call.arguments.items() if name != "self")
    return contract(call, [call["self"], right], ["k", "k"], "")


@rule("outer", "ger")
def outer(call: Call) -> Dims:
    return (*call.dims(call["self"]), *call.dims(call["vec2"]))


@rule("einsum")
def einsum(call: Call) -> Dims:
    operands: list[Tensor] = list(call["tensors"])
    terms, result = parse_einsum(call["equation"], [tensor.ndim for tensor in operands])
    if any(len(set(term)) != len(term) for term in terms):  # a diagonal
        for tensor in operands:
            call.freeze(*call.dims(tensor))
        return fixed(output(call).shape)
    return contract(call, operands, terms, result)


def parse_einsum(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """Terms and result of an equation, an ellipsis written out in letters of its own.

    >>> parse_einsum("...ij,jk->...ik", [3, 2])
    (['Zij', 'jk'], 'Zik')
    """
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    spare = "ZYXWVUTS"
    longest = 0
    for k, (term, rank) in enumerate(zip(terms, ranks, strict=True)):
        if "..." in term:
            extra = rank - (len(term) - 3)
            longest = max(longest, extra)
            terms[k] = term.replace("...", spare[:extra][::-1])
    every = "".join(terms)
    if not arrow:
        result = spare[:longest][::-1] + "".join(
            sorted(letter for letter in set(every) if every.count(letter) == 1 and letter not in spare)
        )
    return terms, result.replace("...", spare[:longest][::-1])


@rule("bilinear")
def bilinear(call: Call) -> Dims:
    """x1 (..., I), x2 (..., J), weight (O, I, J) -> (..., O)."""
    first, second, weight = call["input1"], call["input2"], call["weight"]
    batch = "abcdefgh"[: first.ndim - 1]
    out = contract(call, [first, weight, second], [batch + "i", "oij", batch + "j"], batch + "o")
    return out if call["bias"] is None else _add(call, out, call.dims(call["bias"]))
