"""Recoveries: bring the accuracy of a cut network back, one method per file.

>>> import torch
>>> from metaprune import zoo
>>> from metaprune.data import load
>>> digits = load("digits")
>>> context = Context(calibration=lambda: digits.train.subset(256, seed=0).batches(64))
>>> recovered = resolve("recalibrate_norm")[0].recover(zoo.build("digits_cnn").eval(), context)
>>> bool((recovered.model.bn1.running_mean == 0).any())
False
"""

from metaprune.recovery._base import (
    RECOVERIES,
    Context,
    NoProgress,
    Progress,
    Recovered,
    Recovery,
    TrainingData,
    names_in,
    no_metrics,
    on_device,
    resolve,
    torch_device,
)
from metaprune.recovery.distil import Distil
from metaprune.recovery.finetune import Finetune
from metaprune.recovery.gradual import Gradual
from metaprune.recovery.iterative_magnitude import IterativeMagnitude
from metaprune.recovery.perp import Perp
from metaprune.recovery.recalibrate_norm import RecalibrateNorm
from metaprune.recovery.reconstruct import Reconstruct

__all__ = [
    "RECOVERIES",
    "Context",
    "Distil",
    "Finetune",
    "Gradual",
    "IterativeMagnitude",
    "NoProgress",
    "Perp",
    "Progress",
    "RecalibrateNorm",
    "Reconstruct",
    "Recovered",
    "Recovery",
    "TrainingData",
    "names_in",
    "no_metrics",
    "on_device",
    "resolve",
    "torch_device",
]
