"""Scales of BatchNorm."""

from dataclasses import dataclass

import torch
from torch import nn

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Scores
from metaprune.errors import ConfigError
from metaprune.graph import Network


@CRITERIA.register("bn_scale")
@dataclass(frozen=True, kw_only=True)
class BnScale(Criterion):
    """Mean absolute BatchNorm weight of a unit. Axes that no BatchNorm scales are left out, and kept.

    Source: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017,
    arXiv:1708.06519.
    """

    def _score(self, network: Network, calibration: Calibration) -> Scores:
        names = [
            f"{path}.weight"
            for path, module in network.model.named_modules()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.weight is not None
        ]
        sums = network.sum_over_units(network.weights, names, torch.abs)
        scores = {
            axis.name: torch.stack([entry.total_U / max(entry.entries, 1) for entry in sums[axis.name]]).mean(0)
            for axis in network.axes
            if axis.prunable and sums[axis.name]
        }
        if not scores:
            raise ConfigError("criterion 'bn_scale' needs BatchNorm weights on a prunable axis, but there are none.")
        return scores
