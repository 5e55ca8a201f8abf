"""Accuracy on a named split, and what the difference of two accuracies on the same images is worth."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metaprune.errors import InputError
from metaprune.task import logits_of

_Z = 1.959963984540054  # 97.5 % point of the standard normal: every interval here is a 95 % one


class Split(Protocol):
    """Labelled samples under a name; the data room has several."""

    @property
    def name(self) -> str:
        """What reports call it, e.g. ``"test"``."""
        ...

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs (n, ...) in float32 and labels (n,) in int64, always in the same order."""
        ...


@dataclass(frozen=True, eq=False)
class Accuracy:
    """Top-1 accuracy of one network on one split.

    Args:
        correct: Which samples are right, shape (n,), bool, in the order of the split.
        split: Name of the split.
        low: Lower end of the 95 % Wilson interval, in percent.
        high: Upper end of the 95 % Wilson interval, in percent.
    """

    correct: NDArray[np.bool_]
    split: str
    low: float
    high: float

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.correct)

    @property
    def top1(self) -> float:
        """Share of right answers, in percent."""
        return 100.0 * float(self.correct.mean())

    def __str__(self) -> str:
        return f"{self.top1:.2f} % on {self.split} ({self.n} samples, 95 % interval {self.low:.2f} to {self.high:.2f})"

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain data, without the samples."""
        return {
            "value": self.top1,
            "unit": "%",
            "n": self.n,
            "low": self.low,
            "high": self.high,
            "spread": "95 % Wilson interval",
            "label": "measured",
            "correct": int(self.correct.sum()),
            "split": self.split,
        }


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Difference of two accuracies on the same samples.

    Args:
        difference: Second minus first, in percentage points.
        low: Lower end of the 95 % interval, in points.
        high: Upper end of the 95 % interval, in points.
        p: Exact two-sided McNemar probability of a split of the disagreements at least as uneven, under equal accuracy.
        only_first: Samples that only the first has right.
        only_second: Samples that only the second has right.
        n: Number of samples.
        split: Name of the split.
    """

    difference: float
    low: float
    high: float
    p: float
    only_first: int
    only_second: int
    n: int
    split: str

    def __str__(self) -> str:
        interval = f"[{self.low:+.2f}, {self.high:+.2f}]"
        return f"{self.difference:+.2f} points {interval} on {self.split} (n={self.n}, McNemar p={self.p:.3g})"

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain data."""
        return {
            "value": self.difference,
            "unit": "points",
            "n": self.n,
            "low": self.low,
            "high": self.high,
            "spread": "95 % paired interval (Bonett-Price)",
            "label": "measured",
            "p": self.p,
            "test": "exact McNemar",
            "only_first": self.only_first,
            "only_second": self.only_second,
            "split": self.split,
        }


def accuracy(
    predict: Callable[[Tensor], Any],
    split: Split,
    *,
    batch_size: int = 500,
    progress: Callable[[int, int], None] | None = None,
) -> Accuracy:
    """Top-1 accuracy of `predict` on every sample of `split`.

    Args:
        predict: Inputs (n, ...) to scores (n, classes), or to a container with such ``logits``; a module in eval mode,
            or any function.
        split: The samples.
        batch_size: Samples per call.
        progress: Called after every batch with the samples done and the samples in all.

    Raises:
        InputError: The split is empty, `predict` is a module in training mode, or its scores have another shape or
            are not finite.
    """
    if len(split) == 0:
        raise InputError(f"a split must hold samples, but {split.name!r} is empty.")
    if isinstance(predict, nn.Module) and any(module.training for module in predict.modules()):
        # BatchNorm would use and change its batch statistics: another network than the one to be judged.
        raise InputError("accuracy is defined in eval mode, but the network is in training mode. Call `.eval()` first.")
    hits: list[Tensor] = []
    done = 0
    with torch.inference_mode():
        for x, y in split.batches(batch_size):
            score_NC = logits_of(predict(x))
            if score_NC.ndim != 2 or len(score_NC) != len(y):
                raise InputError(
                    f"scores must have the shape ({len(y)}, classes), but they have {tuple(score_NC.shape)}. "
                    "Accuracy is for classifiers; use another task for this network."
                )
            if not bool(score_NC.isfinite().all()):
                raise InputError(f"scores must be finite, but those of samples {done} to {done + len(y) - 1} are not.")
            hits.append(score_NC.argmax(1).cpu() == y.cpu())
            done += len(y)
            if progress is not None:
                progress(done, len(split))
    return of_hits(torch.cat(hits).numpy(), split.name)


def of_hits(correct: NDArray[np.bool_], split: str) -> Accuracy:
    """The accuracy that follows from right and wrong, shape (n,), bool.

    >>> print(of_hits(np.array([True] * 9 + [False]), "test"))
    90.00 % on test (10 samples, 95 % interval 59.58 to 98.21)
    """
    low, high = _wilson(int(correct.sum()), len(correct))
    return Accuracy(correct.astype(bool), split, 100 * low, 100 * high)


def compare(first: Accuracy, second: Accuracy) -> Paired:
    """Second minus first, on the same samples.

    The interval is the adjusted Wald interval for paired proportions (one pseudo-sample on each kind of disagreement):
    Bonett and Price, J. Educ. Behav. Stat. 37(4), 2012. The probability is McNemar's test in its exact binomial form.

    Raises:
        InputError: The two were not measured on the same samples.

    >>> one = of_hits(np.array([True] * 90 + [False] * 10), "test")
    >>> print(compare(one, one))
    +0.00 points [-2.72, +2.72] on test (n=100, McNemar p=1)
    """
    if (first.n, first.split) != (second.n, second.split):
        raise InputError(
            f"a paired comparison needs the same samples, but one has {first.n} of {first.split!r} and the other "
            f"{second.n} of {second.split!r}."
        )
    lost = int((first.correct & ~second.correct).sum())
    won = int((~first.correct & second.correct).sum())
    n = first.n
    p_lost, p_won = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    centre = p_won - p_lost
    half = _Z * math.sqrt((p_won + p_lost - centre**2) / (n + 2))
    return Paired(
        difference=100 * (won - lost) / n,
        low=100 * max(-1.0, centre - half),
        high=100 * min(1.0, centre + half),
        p=_mcnemar(lost, won),
        only_first=lost,
        only_second=won,
        n=n,
        split=first.split,
    )


def _wilson(k: int, n: int) -> tuple[float, float]:
    centre = (k + _Z**2 / 2) / (n + _Z**2)
    half = _Z / (n + _Z**2) * math.sqrt(k * (n - k) / n + _Z**2 / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


def _mcnemar(lost: int, won: int) -> float:
    m, tail, term = lost + won, 0, 1
    for k in range(min(lost, won) + 1):  # integers all the way: no underflow however many disagreements there are
        tail += term
        term = term * (m - k) // (k + 1)
    return min(1.0, float(2 * tail / 2**m))
