import pytest
import torch

from metaprune.zoo import imagenet

PARAMETERS = {  # as published with the weights of torchvision
    "resnet50": 25_557_032,
    "densenet121": 7_978_856,
    "densenet201": 20_013_928,
    "mobilenet_v3": 5_483_032,
    "vit_b": 86_567_656,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_has_the_published_size(name):
    with torch.device("meta"):
        model = getattr(imagenet, name)()
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]
    assert model.eval()(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
