"""VGG-11 with BatchNorm for CIFAR, whose classifier reads a flattened map, so that one channel is several inputs of it.

Source: Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015, arXiv:1409.1556, table 1, column A.
Differs from it: BatchNorm after each convolution, no pooling after the last two, one hidden layer in the classifier.
"""

from torch import Tensor, nn

from metaprune.errors import ConfigError
from metaprune.zoo._base import MODELS, ZooModel, init_convolutions, random_values, require_multiple

POOL_AFTER = (0, 1, 3, 5)  # convolutions that a 2x2 max pooling follows


class Vgg(nn.Module):
    """Eight convolutions, a spatial flatten, two linear layers."""

    def __init__(self, widths: tuple[int, ...], hidden: int, image_size: int, in_channels: int, num_classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(zip((in_channels, *widths[:-1]), widths, strict=True)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            if index in POOL_AFTER:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        pixels = (image_size // 2 ** len(POOL_AFTER)) ** 2
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
    hidden: int = 512,
    image_size: int = 32,
    in_channels: int = 3,
    num_classes: int = 10,
) -> Vgg:
    """VGG-11 with BatchNorm.

    Args:
        widths: Channels of the eight convolutions.
        hidden: Neurons between the two linear layers.
        image_size: Height and width of the images in pixels, a multiple of 16.
        in_channels: Channels of the images.
        num_classes: Number of logits.

    Raises:
        ConfigError: There are not eight widths, or `image_size` is no multiple of 16.
    """
    if len(widths) != 8:
        raise ConfigError(f"`widths` must be eight numbers, but it is {tuple(widths)}.")
    require_multiple("image_size, 2 ** poolings", image_size, 2 ** len(POOL_AFTER))
    return Vgg(tuple(widths), hidden, image_size, in_channels, num_classes)


MODELS.register("cifar_vgg11")(ZooModel(build=cifar_vgg11, example_inputs=random_values(2, 3, 32, 32)))
