"""Splits by content: an image falls into a split by a hash of its bytes, wherever it stands in its file."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metaprune.errors import InputError

Keys = npt.NDArray[np.uint64]


def content_keys(items: Iterable[bytes | memoryview], salt: str) -> Keys:
    """A 64-bit hash of each item; `salt` names the dataset, so that datasets are cut independently."""
    person = salt.encode()[:16]  # the longest that BLAKE2 takes
    keys = [int.from_bytes(hashlib.blake2b(item, digest_size=8, person=person).digest(), "big") for item in items]
    return np.array(keys, dtype=np.uint64)


def image_keys(images: Tensor, salt: str) -> Keys:
    """:func:`content_keys` of each image of a tensor (N, C, H, W)."""
    return content_keys((row.data for row in images.flatten(1).contiguous().numpy()), salt)


def cut(keys: Keys, shares: Sequence[float], what: str) -> list[Tensor]:
    """Positions (int64, ascending) of each part, when the items ordered by key are cut at `shares`.

    Equal items have equal keys and stay together, so that no part repeats an image of another.

    Args:
        keys: One for each item.
        shares: Of the parts, with sum 1.
        what: Names the items in the message.

    Raises:
        InputError: A part would be empty.

    >>> cut(np.array([5, 9, 1, 7], dtype=np.uint64), (0.75, 0.25), "images")
    [tensor([0, 2, 3]), tensor([1])]
    """
    ranks = np.sort(keys)
    ends = [round(len(keys) * share) for share in np.cumsum(shares)[:-1]]
    edges = ranks[np.clip(ends, 0, len(keys) - 1)] if len(keys) else ranks
    part_N = np.searchsorted(edges, keys, side="right")
    parts = [torch.from_numpy(np.flatnonzero(part_N == part)) for part in range(len(shares))]
    if not all(len(part) for part in parts):
        raise InputError(
            f"{len(keys)} {what} are too few for {len(shares)} splits with shares of "
            f"{', '.join(f'{share:.0%}' for share in shares)}. Add images, or give the splits yourself."
        )
    return parts
