"""VGG-11 with BatchNorm for CIFAR, whose classifier reads a flattened map, so that one channel is several inputs of it.

Source: Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015, arXiv:1409.1556, table 1, column A.
Differs from it: BatchNorm after each convolution, no pooling after the last two, one hidden layer in the classifier.
"""

from torch import Tensor, nn

from metaprune.errors import ConfigError
from metaprune.zoo._base import MODELS, ZooModel, init_convolutions, random_values, require_multiple


class Vgg(nn.Module):
    """Convolutions, a spatial flatten, two linear layers."""

    def __init__(
        self,
        widths: tuple[int, ...],
        pool_after: tuple[int, ...],
        hidden: int,
        image_size: int,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(zip((in_channels, *widths[:-1]), widths, strict=True), 1):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            if number in pool_after:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        pixels = (image_size // 2 ** len(pool_after)) ** 2
        self.classifier = nn.Sequential(
            nn.Linear(widths[-1] * pixels, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        )
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, in_channels, image_size, image_size) to logits (n, num_classes)."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def cifar_vgg11(
    *,
    widths: tuple[int, ...] = (64, 128, 256, 256, 512, 512, 512, 512),
    pool_after: tuple[int, ...] = (1, 2, 4, 6),
    hidden: int = 512,
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
) -> Vgg:
    """VGG with BatchNorm, of 11 layers unless told otherwise.

    Args:
        widths: Channels of each convolution.
        pool_after: Convolutions, counted from 1, that a 2x2 max pooling follows.
        hidden: Neurons between the two linear layers.
        image_size: Height and width of the images in pixels, a multiple of ``2 ** len(pool_after)``: 16.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Raises:
        ConfigError: `pool_after` names a convolution that there is not, or `image_size` is no such multiple.
    """
    if len(set(pool_after)) < len(pool_after) or max(pool_after) > len(widths):
        raise ConfigError(
            f"`pool_after` must be different numbers from 1 to {len(widths)}, the convolutions in `widths`, but "
            f"it is {tuple(pool_after)}."
        )
    require_multiple("image_size, 2 ** poolings", image_size, 2 ** len(pool_after))
    return Vgg(tuple(widths), tuple(pool_after), hidden, image_size, in_channels, num_classes)


MODELS.register("cifar_vgg11")(ZooModel(build=cifar_vgg11, example_inputs=random_values(2, 3, 32, 32)))
