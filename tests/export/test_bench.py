"""One report of latency and memory, the files being read before anything is timed."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from metaprune.errors import ConfigError, InputError
from metaprune.export.bench import bench
from metaprune.export.to_onnx import export


def net(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, channels, 3)).eval()


def test_a_report_of_two_files(tmp_path: Path) -> None:
    for name, channels in (("dense", 48), ("slim", 8)):
        export(net(channels), torch.randn(2, 3, 24, 24), tmp_path / f"{name}.onnx")
    shares: list[float] = []
    paths = [tmp_path / "dense.onnx", tmp_path / "slim.onnx"]
    result = bench(paths, rounds=100, seconds=0.3, repeats=1, progress=shares.append)
    assert result.latency.comparisons[0].verdict == "faster"
    assert [one.file for one in result.memory] == [str(path) for path in paths]
    assert result.memory[1].size.value < result.memory[0].size.value
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert record["latency"]["host"]["cores"] >= 1


def test_a_bad_file_is_found_before_anything_is_timed(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_text("no network")
    with pytest.raises(InputError, match="is none"):
        bench([tmp_path / "bad.onnx"])
    with pytest.raises(ConfigError, match="at least one file"):
        bench([])
