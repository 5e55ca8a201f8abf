import torch

from metaprune.zoo import build


def test_one_channel_is_several_inputs_of_the_classifier():
    model = build("cifar_vgg11").eval()
    assert model.features(torch.randn(1, 3, 32, 32)).shape == (1, 512, 2, 2)
    assert model.classifier[0].in_features == 512 * 2 * 2


def test_image_size_is_an_option():
    assert build("cifar_vgg11", image_size=48)(torch.randn(2, 3, 48, 48)).shape == (2, 10)
