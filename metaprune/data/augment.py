"""The standard augmentation of small images: shift by a few pixels, mirror half of them.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, arXiv:1512.03385, section 4.2.

Legend of the tensor suffixes: N images, C channels, H rows, W columns, P = H * W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from metaprune.errors import ConfigError

FILLS = ("zero", "reflect")


@dataclass(frozen=True, kw_only=True)
class CropFlip:
    """A random crop of the padded image, mirrored with probability 1/2; every image of a batch has its own.

    Args:
        pad: Rows and columns added on each side, so also the largest shift in pixels.
        flip: Whether to mirror left and right; wrong for digits and letters.
        fill: What stands in the border: ``"zero"``, or ``"reflect"`` for the mirrored image without its edge.
    """

    pad: int = 4
    flip: bool = True
    fill: str = "zero"

    def __post_init__(self) -> None:
        if self.pad < 0 or self.fill not in FILLS:
            raise ConfigError(f"`pad >= 0` and `fill` in {FILLS} must hold, but they are {self.pad}, {self.fill!r}.")

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Downward and rightward crop offsets in [0, 2 * pad] and the mirror flags of `count` images."""
        offsets = torch.randint(2 * self.pad + 1, (2, count), generator=generator)
        flags = torch.randint(2, (count,), generator=generator).bool() & self.flip
        return offsets[0], offsets[1], flags

    def __call__(self, images_NCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Changed copies of `images_NCHW`, of the same shape and dtype; draws from `generator` (CPU) alone."""
        n, c, h, w = images_NCHW.shape
        if self.fill == "reflect" and self.pad >= min(h, w):
            raise ConfigError(f"`pad < {min(h, w)}` must hold to reflect images of {h}x{w}, but pad={self.pad}.")
        down_N, right_N, flip_N = (drawn.to(images_NCHW.device) for drawn in self.draw(n, generator))
        columns_W = torch.arange(w, device=images_NCHW.device)
        rows_NH = torch.arange(h, device=images_NCHW.device) + down_N[:, None] - self.pad
        columns_NW = torch.where(flip_N[:, None], w - 1 - columns_W, columns_W) + right_N[:, None] - self.pad
        rows_NH, inside_NH = self._source(rows_NH, h)
        columns_NW, inside_NW = self._source(columns_NW, w)
        # One gather over flat pixels: an index of N x P instead of three of N x C x H x W.
        index_NP = (rows_NH[:, :, None] * w + columns_NW[:, None, :]).view(n, 1, h * w)
        moved_NCHW = images_NCHW.flatten(2).gather(2, index_NP.expand(n, c, h * w)).view(n, c, h, w)
        if self.fill == "zero" and self.pad:
            moved_NCHW *= (inside_NH[:, :, None] & inside_NW[:, None, :])[:, None]
        return moved_NCHW

    def _source(self, wanted: Tensor, size: int) -> tuple[Tensor, Tensor]:
        inside = (wanted >= 0) & (wanted < size)
        if self.fill == "reflect":
            return size - 1 - (size - 1 - wanted.abs()).abs(), inside
        return wanted.clamp(0, size - 1), inside
