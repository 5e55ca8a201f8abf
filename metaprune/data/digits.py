"""The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn: the dataset that needs no file.

Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998
(its test part).
"""

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
    from sklearn.datasets import load_digits  # takes a second to import

    bunch = load_digits()
    images_NCHW = torch.from_numpy(bunch.images).to(torch.uint8)[:, None]  # whole numbers from 0 to 16
    labels_N = torch.from_numpy(bunch.target).to(torch.int64)
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
