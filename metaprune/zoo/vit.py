"""A small vision transformer for CIFAR with fused query, key and value.

Source: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929, section 3.1 (pre-norm, class
token, learned positions).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaprune.zoo._base import MODELS, ZooModel, random_values, require_multiple


class FusedAttention(nn.Module):
    """Self-attention whose queries, keys and values come out of one linear layer."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = width // num_heads  # of queries and keys
        self.value_dim = width // num_heads  # of values: an axis of its own
        self.scale = self.head_dim**-0.5  # stays when head_dim shrinks, or the softmax would change
        self.split_sizes = (width, width, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) to (n, t, width)."""
        n, t, _ = x.shape
        q, k, v = self.qkv(x).split_with_sizes(self.split_sizes, dim=-1)
        q = q.view(n, t, self.num_heads, self.head_dim).transpose(1, 2)
        k = k.view(n, t, self.num_heads, self.head_dim).transpose(1, 2)
        v = v.view(n, t, self.num_heads, self.value_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class EncoderBlock(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and inside a shortcut."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = FusedAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, t, width) to (n, t, width)."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = self.mlp(self.norm2(x))
        return x + y


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, encoder blocks, a linear layer on the class token."""

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        hidden: int,
        patch_size: int,
        image_size: int,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        patches = (image_size // patch_size) ** 2
        self.patch_embedding = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.empty(1, patches + 1, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, num_heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_classes)
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.position_embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, image_size, image_size) to logits (n, num_classes)."""
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(patches.shape[0], -1, -1), patches), dim=1)
        x = self.norm(self.blocks(x + self.position_embedding))
        logits: Tensor = self.linear(x[:, 0])
        return logits


def vit_tiny(
    *,
    width: int = 64,
    depth: int = 4,
    num_heads: int = 4,
    hidden: int = 128,
    patch_size: int = 4,
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
) -> VisionTransformer:
    """A small vision transformer.

    Args:
        width: Channels of the residual stream, a multiple of `num_heads`.
        depth: Encoder blocks.
        num_heads: Attention heads.
        hidden: Neurons of each perceptron.
        patch_size: Height and width of a patch in pixels.
        image_size: Height and width of the images in pixels, a multiple of `patch_size`.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Raises:
        ConfigError: `width` or `image_size` is no such multiple.
    """
    require_multiple("width, num_heads", width, num_heads)
    require_multiple("image_size, patch_size", image_size, patch_size)
    return VisionTransformer(width, depth, num_heads, hidden, patch_size, image_size, in_channels, num_classes)


MODELS.register("vit_tiny")(ZooModel(build=vit_tiny, example_inputs=random_values(2, 3, 32, 32)))
