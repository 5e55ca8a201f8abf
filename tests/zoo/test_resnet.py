import re

import pytest
import torch
from safetensors.torch import load_file

from metaprune.data import load
from metaprune.errors import ConfigError
from metaprune.zoo import build, load_weights
from metaprune.zoo.resnet import BasicBlock, PadShortcut, cifar_resnet

ACCURACY = {20: 91.22, 32: 92.20, 44: 92.78, 56: 93.40}  # per cent of the 5,000 images of test_batch


def test_keys_of_the_padding_variant():
    allowed = re.compile(r"(conv1|bn1|linear|layer[123]\.\d+\.(conv1|bn1|conv2|bn2))\.\w+")
    assert all(allowed.fullmatch(key) for key in build("cifar_resnet32").state_dict())


def test_projection_adds_exactly_the_shortcuts():
    added = build("cifar_resnet20_projection").state_dict().keys() - build("cifar_resnet20").state_dict().keys()
    modules = {key.rsplit(".", 1)[0] for key in added}
    assert modules == {f"layer{stage}.0.downsample.{part}" for stage in (2, 3) for part in (0, 1)}


def test_depth_counts_the_weighted_layers():
    weighted = [m for m in cifar_resnet(56).modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == 56
    with pytest.raises(ConfigError, match="depth=21"):
        cifar_resnet(21)


def test_padding_follows_its_attributes():
    shortcut = PadShortcut(4, 9, stride=2)
    x = torch.randn(2, 4, 5, 6)
    assert (shortcut.pad_front, shortcut.pad_back) == (2, 3)
    shortcut.pad_front, shortcut.pad_back = 1, 0
    y = shortcut(x)
    assert torch.equal(y[:, 1:], x[:, :, ::2, ::2])
    assert not y[:, :1].any()
    assert y.shape == (2, 5, 3, 3)


def test_slim_block_equals_masked_block():
    """Cutting by hand, with nothing but attributes to bring in step."""
    block, x = BasicBlock(4, 8, stride=2, projection=False).eval(), torch.randn(2, 4, 8, 8)
    keep_in, keep_out = [0, 3], [0, 1, 2, 5, 7]  # of the shortcut's channels 2..5, those from inputs 0 and 3 are kept
    with torch.no_grad():
        x[:, [1, 2]] = 0
        expected = block(x)[:, keep_out]
        block.conv1.weight = torch.nn.Parameter(block.conv1.weight[:, keep_in])
        block.conv2.weight = torch.nn.Parameter(block.conv2.weight[keep_out])
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(block.bn2, name).data = getattr(block.bn2, name)[keep_out]
        block.downsample.pad_front, block.downsample.pad_back = 2, 1
        torch.testing.assert_close(block(x[:, keep_in]), expected)


@pytest.mark.parametrize("depth", ACCURACY)
def test_given_weights_load_unchanged(depth, cifar10_weights):
    model = build(f"cifar_resnet{depth}")
    model.load_state_dict(load_file(cifar10_weights / f"cifar10_resnet{depth}.safetensors"), strict=True)


@pytest.mark.parametrize("depth", [20, *(pytest.param(depth, marks=pytest.mark.long) for depth in (32, 44, 56))])
def test_given_weights_have_their_accuracy(depth, cifar10, cifar10_weights):
    model = build(f"cifar_resnet{depth}").eval()
    load_weights(model, cifar10_weights / f"cifar10_resnet{depth}.safetensors")
    test = load(f"cifar10:{cifar10}").test
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test.batches(250))
    assert len(test) == 5000
    assert 100 * right / len(test) == pytest.approx(ACCURACY[depth], abs=1e-9)
