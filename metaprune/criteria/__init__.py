"""Criteria: what a unit is worth, one file each."""

from metaprune.criteria._base import CRITERIA, Calibration, Criterion, Curves, Scores, Verdict, require_entrywise
from metaprune.criteria.bn_scale import BnScale
from metaprune.criteria.combined import Product, RankAverage
from metaprune.criteria.distortion import Distortion
from metaprune.criteria.fisher import Fisher
from metaprune.criteria.flap import Flap
from metaprune.criteria.fpgm import Fpgm
from metaprune.criteria.gaussian import Gaussian
from metaprune.criteria.gblm import Gblm
from metaprune.criteria.hessian import Hessian
from metaprune.criteria.hrank import HRank
from metaprune.criteria.lamp import Lamp
from metaprune.criteria.magnitude import L1, L2
from metaprune.criteria.metanet import MetanetScore, metanet_edit, metanet_scores, unit_scores
from metaprune.criteria.obs import Obs
from metaprune.criteria.pq import Pq
from metaprune.criteria.random import Random
from metaprune.criteria.taylor import Taylor
from metaprune.criteria.wanda import Wanda

__all__ = [
    "CRITERIA",
    "L1",
    "L2",
    "BnScale",
    "Calibration",
    "Criterion",
    "Curves",
    "Distortion",
    "Fisher",
    "Flap",
    "Fpgm",
    "Gaussian",
    "Gblm",
    "HRank",
    "Hessian",
    "Lamp",
    "MetanetScore",
    "Obs",
    "Pq",
    "Product",
    "Random",
    "RankAverage",
    "Scores",
    "Taylor",
    "Verdict",
    "Wanda",
    "metanet_edit",
    "metanet_scores",
    "require_entrywise",
    "unit_scores",
]
