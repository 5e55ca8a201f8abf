"""Small reference networks, one family per file, and the ways to name a network on the command line.

>>> import metaprune.zoo as zoo
>>> model = zoo.build("cifar_resnet20", num_classes=100)
>>> model(zoo.example_inputs("cifar_resnet20")).shape
torch.Size([2, 100])
"""

from metaprune.zoo import (  # importing a family registers its networks
    densenet,
    digits,
    llama,
    mlp,
    mobilenet,
    recurrent,
    resnet,
    resnext,
    shufflenet,
    vgg,
    vit,
)
from metaprune.zoo._base import MODELS, ZooModel, build, example_inputs, options_for_images
from metaprune.zoo.sources import SourceModel, resolve_model
from metaprune.zoo.weights import load_weights

__all__ = [
    "MODELS",
    "SourceModel",
    "ZooModel",
    "build",
    "densenet",
    "digits",
    "example_inputs",
    "llama",
    "load_weights",
    "mlp",
    "mobilenet",
    "options_for_images",
    "recurrent",
    "resnet",
    "resnext",
    "resolve_model",
    "shufflenet",
    "vgg",
    "vit",
]
