"""The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn: the dataset that needs no file.

Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(its test part).
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from metaprune.data._arrays import from_arrays
from metaprune.data._base import DATASETS, Dataset
from metaprune.data._cut import cut, image_keys
from metaprune.data.augment import CropFlip
from metaprune.errors import ConfigError

SHARES = (0.7, 0.1, 0.2)
MEAN = (0.3053,)  # of the training images, rounded; fixed, so that weights stay good when scikit-learn changes
STD = (0.3764,)


@DATASETS.register("digits")
def digits(argument: str = "") -> Dataset:
    """Digits 0 to 9 as images of 1x8x8, about 70/10/20 % by a hash of each image.

    Raises:
        ConfigError: `argument` is not empty; the dataset has no options.
    """
    if argument:
        raise ConfigError(f"`digits` takes nothing after it, but got {argument!r}.")
    rows_NP = torch.from_numpy(np.loadtxt(_file(), dtype=np.uint8, delimiter=","))  # 64 pixels from 0 to 16, the label
    images_NCHW, labels_N = rows_NP[:, :-1].reshape(-1, 1, 8, 8), rows_NP[:, -1].to(torch.int64)
    parts = cut(image_keys(images_NCHW, "digits"), SHARES, "images")
    return from_arrays(
        "digits",
        "digits",
        {
            name: (images_NCHW, labels_N, part)
            for name, part in zip(("train", "validation", "test"), parts, strict=True)
        },
        classes=tuple(map(str, range(10))),
        scale=1 / 16,
        mean=MEAN,
        std=STD,
        augmentation=CropFlip(pad=1, flip=False),
    )


def _file() -> Path:
    """What `sklearn.datasets.load_digits` reads; it is read here because that takes a second to import."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
