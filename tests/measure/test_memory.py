"""Size, load time and memory of a file, from fresh processes."""

import json
import sys
from pathlib import Path

import pytest

from metaprune.errors import ConfigError, InputError
from metaprune.measure.host import host
from metaprune.measure.memory import memory


def test_a_file_is_weighed(big: Path, small: Path) -> None:
    heavy, light = memory(big, repeats=2), memory(small, repeats=1, beside=[big])
    assert heavy.size.value == big.stat().st_size
    assert light.size.value == small.stat().st_size + big.stat().st_size
    assert heavy.load.value > 0
    assert heavy.load.n == 2
    json.dumps(heavy.to_json())
    if sys.platform == "linux":
        assert heavy.peak is not None
        assert light.peak is not None
        assert heavy.base is not None
        assert heavy.peak.value > big.stat().st_size
        assert heavy.base.value > 10 * 2**20
        assert heavy.note == ""
    else:
        assert heavy.peak is None
        assert "Linux" in heavy.note


def test_what_cannot_be_weighed_is_refused(big: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not there"):
        memory(tmp_path / "none.onnx")
    with pytest.raises(ConfigError, match="repeats"):
        memory(big, repeats=0)


def test_the_host_is_described_without_a_name() -> None:
    record = json.dumps(host().to_json())
    import platform

    assert platform.machine() in record
    assert platform.node() not in record or len(platform.node()) < 4
