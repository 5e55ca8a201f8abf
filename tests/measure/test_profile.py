"""Every node with its time, its shapes, and whether it runs on blocks of channels."""

import json
from pathlib import Path

import pytest

from metaprune.errors import ConfigError, InputError
from metaprune.measure.profile import profile


def test_every_node_is_told(big: Path) -> None:
    nodes = profile(big, rounds=7)
    convolutions = [node for node in nodes if node.operator == "Conv"]
    assert len(convolutions) == 3
    assert [node.outputs[0] for node in convolutions] == [(1, 64, 24, 24)] * 3
    assert convolutions[1].inputs[1] == (64, 64, 3, 3)
    assert sum(node.share for node in nodes) == pytest.approx(1)
    assert convolutions[1].share > 0.2
    for node in nodes:
        assert node.time.n == 7
        assert node.time.low is not None
        assert 0 < node.time.low <= node.time.value
    json.dumps([node.to_json() for node in nodes], allow_nan=False)


def test_what_cannot_be_looked_into_is_refused(big: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rounds"):
        profile(big, rounds=0)
    with pytest.raises(InputError, match="not there"):
        profile(tmp_path / "none.onnx")
