"""A multilayer perceptron: the smallest network with axes to cut."""

from itertools import pairwise

from torch import Tensor, nn

from metaprune.zoo._base import MODELS, ZooModel, random_values


class Mlp(nn.Module):
    """Linear layers with ReLU between them, over the flattened input."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (n, …) with in_features values each to logits (n, num_classes)."""
        logits: Tensor = self.layers(x.flatten(1))
        return logits


def mlp(*, in_features: int = 64, widths: tuple[int, ...] = (128, 64), num_classes: int = 10) -> Mlp:
    """A multilayer perceptron.

    Args:
        in_features: Values of one input; 64 for the 8x8 digits.
        widths: Neurons of each hidden layer.
        num_classes: Number of logits.
    """
    return Mlp((in_features, *widths, num_classes))


MODELS.register("mlp")(ZooModel(build=mlp, example_inputs=random_values(2, 1, 8, 8)))
