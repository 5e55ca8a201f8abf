"""Metanetworks as files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from metaprune.errors import ConfigError, InputError
from metaprune.metanet import Metanet, PaperShape, Shape, load_checkpoint, new_metanet, save_checkpoint, shipped

SHAPE = Shape(hidden=8, layers=1, heads=2, rank=2, reads=("l2",))


@pytest.mark.parametrize("shape", [SHAPE, PaperShape(hidden=8, layers=1, edge_ratio=0.5)], ids=lambda shape: shape.mode)
def test_a_metanetwork_comes_back_with_its_card(shape, tmp_path):
    metanet = new_metanet(shape)
    found = load_checkpoint(save_checkpoint(metanet, tmp_path / "m.safetensors", {"seed": 3}))
    assert found.metanet.shape == shape
    assert found.card == {"seed": 3}
    assert not found.metanet.training
    for name, tensor in metanet.state_dict().items():
        assert torch.equal(found.metanet.state_dict()[name], tensor)


@pytest.mark.parametrize("name", shipped())
def test_what_ships_can_be_read(name):
    found = load_checkpoint(name)
    assert {"population", "data", "seed"} <= set(found.card)


def test_what_is_no_metanetwork_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'nothing' is neither"):
        load_checkpoint("nothing")
    path = save_checkpoint(Metanet(SHAPE), tmp_path / "m.safetensors")
    (tmp_path / "short.safetensors").write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(tmp_path / "short.safetensors")
    tensors = load_file(path)
    content = {"schema": 0, "shape": SHAPE.to_json(), "card": {}}
    save_file(tensors, tmp_path / "old.safetensors", {"metanet": json.dumps(content)})
    with pytest.raises(InputError, match="has schema 0, but this version reads 1"):
        load_checkpoint(tmp_path / "old.safetensors")
    content |= {"schema": 1, "shape": {**SHAPE.to_json(), "hidden": 16}}
    save_file(tensors, tmp_path / "other.safetensors", {"metanet": json.dumps(content)})
    with pytest.raises(InputError, match="cannot be read"):
        load_checkpoint(tmp_path / "other.safetensors")
