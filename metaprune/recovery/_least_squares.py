"""Ridge least squares over the rows of many batches: what is to be added to a weight and an intercept.

Legend of the tensor suffixes: as in :mod:`metaprune.graph.linear_calls`; C some outputs, K inputs that one
of them uses.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaprune.errors import InputError
from metaprune.graph.linear_calls import damped_factor

_SMALLEST = 1e-3  # scale of a BatchNorm channel relative to the largest; what goes through less is not made up for
SYSTEMS = 1 << 24  # entries of normal equations that are solved at once
_UNCHANGED = 1e-10  # mean square of what a layer lacks, relative to that of what it should give


@dataclass
class Rows:
    """Some samples and places of one batch.

    Attributes:
        x_GBD: What the layer reads.
        present_GBO: What becomes of its result in the cut network.
        wanted_GBO: What that is in the dense one.
        scale_GO: What the result is multiplied by before that, by a BatchNorm; None for nothing.
    """

    x_GBD: Tensor
    present_GBO: Tensor
    wanted_GBO: Tensor
    scale_GO: Tensor | None

    def lacks(self, relaxed: bool) -> Tensor:
        """What the result of the layer lacks, (G, B, O); relaxed, what a ReLU makes zero may be anything negative."""
        wanted, present = self.wanted_GBO, self.present_GBO
        lacks = (torch.where(wanted > 0, wanted, present.clamp_max(0)) if relaxed else wanted) - present
        return lacks if self.scale_GO is None else lacks * _inverse(self.scale_GO)[:, None]

    def change(self, weight_GDO: Tensor, shift_GO: Tensor) -> None:
        """Follow a change of weight and intercept."""
        change = self.x_GBD @ weight_GDO.to(self.x_GBD.dtype) + shift_GO[:, None].to(self.x_GBD.dtype)
        self.present_GBO = self.present_GBO + (change if self.scale_GO is None else change * self.scale_GO[:, None])


def _inverse(scale: Tensor) -> Tensor:
    """One over a scale; 0 for channels that it lets almost nothing through."""
    through = scale.abs() > _SMALLEST * scale.abs().max()
    return torch.where(through, 1 / torch.where(through, scale, 1), 0)


class Sums:
    """Moments of what a layer reads and lacks, over the rows of all batches.

    Args:
        rows: One entry a batch; inputs are counted from near their mean from now on, because differences of large sums
            are inexact.
        centred: There is an intercept.
    """

    def __init__(self, rows: Sequence[Rows], centred: bool) -> None:
        self.rows, self.centred = rows, centred
        x_GBD = rows[0].x_GBD
        self.origin_GD = x_GBD.mean(1) if centred else torch.zeros_like(x_GBD[:, 0])
        for part in rows:
            part.x_GBD = part.x_GBD - self.origin_GD[:, None]
        self.count = sum(part.x_GBD.shape[1] for part in rows)
        self.given = sum(float(part.wanted_GBO.square().sum()) for part in rows)
        self.x_GD = self._mean(part.x_GBD.sum(1) for part in rows) * centred
        self._factor_GDD: Tensor | None = None
        self._change: tuple[Tensor, Tensor] | None = None  # which the rows have not followed yet

    def _mean(self, sums: Iterable[Tensor]) -> Tensor:
        total = torch.stack([part.double() for part in sums]).sum(0) / self.count
        if not bool(total.isfinite().all()):
            raise InputError(
                "activations must be finite, but those of the calibration data are not. Look for NaN or infinities in "
                "the weights and in the data."
            )
        return total

    def look(self, relaxed: bool) -> bool:
        """See what the layer lacks now; whether it is more than rounding."""
        if self._change is not None:
            for part in self.rows:
                part.change(*self._change)
            self._change = None
        lacks = [part.lacks(relaxed) for part in self.rows]
        self.r_GO = self._mean(r_GBO.sum(1) for r_GBO in lacks)
        self.xr_GDO = self._mean(part.x_GBD.mT @ r_GBO for part, r_GBO in zip(self.rows, lacks))
        return sum(float(r_GBO.square().sum()) for r_GBO in lacks) > _UNCHANGED * self.given

    def solved(self, ridge: float, only_bias: bool, kept_GDO: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Changes of the weight (G, D, O) and of the intercept (G, O), which the rows follow at the next look.

        Args:
            ridge: Strength of the ridge.
            only_bias: Change the intercept alone.
            kept_GDO: The entries of the weight that may change; None for all.
        """
        change_GDO, shift_GO = torch.zeros_like(self.xr_GDO), self.r_GO * self.centred
        if not only_bias:
            xr_GDO = self.xr_GDO - self.x_GD[:, :, None] * shift_GO[:, None]
            change_GDO = _solved(self._factor(ridge), xr_GDO, kept_GDO)
            shift_GO = shift_GO - (self.x_GD[:, None] @ change_GDO)[:, 0]
        self._change = change_GDO, shift_GO
        return change_GDO, shift_GO - (self.origin_GD.double()[:, None] @ change_GDO)[:, 0]

    def _factor(self, ridge: float) -> Tensor:
        """Of the damped second moment of what the layer reads, which stays the same."""
        if self._factor_GDD is None:
            xx_GDD = self._mean(part.x_GBD.mT @ part.x_GBD for part in self.rows)
            self._factor_GDD = damped_factor(xx_GDD - self.x_GD[:, :, None] * self.x_GD[:, None], ridge)
        return self._factor_GDD


def _solved(factor_GDD: Tensor, xr_GDO: Tensor, kept_GDO: Tensor | None) -> Tensor:
    """Least squares with the Cholesky factors of their second moments, over all entries or over those that are kept."""
    if kept_GDO is None:
        return torch.cholesky_solve(xr_GDO, factor_GDD)
    h_GDD = factor_GDD @ factor_GDD.mT
    return torch.stack([on_support(h_DD, xr_DO, kept_DO) for h_DD, xr_DO, kept_DO in zip(h_GDD, xr_GDO, kept_GDO)])


def on_support(h_DD: Tensor, xr_DO: Tensor, kept_DO: Tensor) -> Tensor:
    """For every output, the solution of its normal equations in which only some inputs take part; else zero.

    Outputs with about as many inputs are solved for together, so many at once as `SYSTEMS` entries hold.

    Args:
        h_DD: Second moment of the inputs, positive definite.
        xr_DO: Products of inputs and what the outputs lack.
        kept_DO: Which inputs an output may use.
    """
    count_O = kept_DO.sum(0)
    change_OD = torch.zeros_like(xr_DO.T)
    for some in count_O.argsort(stable=True).split(max(1, SYSTEMS // int(count_O.max().clamp_min(1)) ** 2)):
        most = int(count_O[some].max())
        kept_CD = kept_DO.T[some]
        used_CK = kept_CD.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        real_CK = kept_CD.gather(1, used_CK)  # those with fewer inputs are filled up with ones that do nothing
        h_CKK = h_DD[used_CK[:, :, None], used_CK[:, None]] * (real_CK[:, :, None] & real_CK[:, None])
        h_CKK.diagonal(dim1=1, dim2=2).add_((~real_CK).to(h_CKK))
        xr_CK = xr_DO.T[some].gather(1, used_CK) * real_CK
        solved_CK = torch.cholesky_solve(xr_CK[:, :, None], torch.linalg.cholesky(h_CKK))[:, :, 0]
        change_OD[some] = torch.zeros_like(change_OD[some]).scatter_(1, used_CK, solved_CK * real_CK)
    return change_OD.T
