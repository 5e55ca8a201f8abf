"""Datasets with splits that never change, one per file.

>>> from metaprune.data import load
>>> digits = load("digits")
>>> images, labels = next(digits.train.batches(32))
>>> images.shape, labels.shape
(torch.Size([32, 1, 8, 8]), torch.Size([32]))
"""

from metaprune.data import cifar10, digits, imagefolder, npz  # importing a dataset registers it
from metaprune.data._arrays import from_arrays
from metaprune.data._base import DATASETS, Dataset, Split, load

__all__ = ["DATASETS", "Dataset", "Split", "cifar10", "digits", "from_arrays", "imagefolder", "load", "npz"]
