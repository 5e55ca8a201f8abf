"""Criteria: what a unit is worth, one file each."""

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Curves, Scores, Verdict
from metaprune.criteria.bn_scale import BnScale
from metaprune.criteria.gaussian import Gaussian
from metaprune.criteria.magnitude import L1, L2
from metaprune.criteria.metanet import MetanetScore, metanet_edit, metanet_scores, unit_scores
from metaprune.criteria.obs import Obs
from metaprune.criteria.random import Random
from metaprune.criteria.taylor import Taylor

__all__ = [
    "CRITERIA",
    "L1",
    "L2",
    "BnScale",
    "Calibration",
    "Criterion",
    "Curves",
    "Gaussian",
    "MetanetScore",
    "Obs",
    "Random",
    "Scores",
    "Taylor",
    "Verdict",
    "metanet_edit",
    "metanet_scores",
    "unit_scores",
]
