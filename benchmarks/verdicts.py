"""How often `metaprune bench` is right: one file against itself, and against one that is a tenth slower.

    OMP_NUM_THREADS=1 python benchmarks/verdicts.py --trials 100 --load 1    # A/A with a second process at work
    OMP_NUM_THREADS=1 python benchmarks/verdicts.py --trials 100 --slower 0.1   # on a quiet machine

The slower file is the same network with more layers; how much longer it takes in truth is measured once, beforehand and
at length. A verdict is wrong if it is `faster` or `slower` of a file against itself, or anything but `slower` of the
slower one; `too noisy` is never wrong, but decides nothing. Prints one JSON line.
"""

import argparse
import collections
import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from metaprune.export import export
from metaprune.measure import latency

_BURN = "import numpy as np\na = np.random.rand(400, 400)\nwhile True: a @ a"


def main() -> None:
    """Run the trials."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--slower", type=float, default=0.0, help="share of time that the second file takes longer")
    parser.add_argument("--load", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each trial")
    given = parser.parse_args()
    layers = round(20 * (1 + given.slower))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files = [written(20, Path(folder) / "one.onnx"), written(layers, Path(folder) / "two.onnx")]
        truth = latency(files, seconds=10 * given.seconds).comparisons[0].ratio.value if given.slower else 1.0
        for _ in range(given.load):
            burner = subprocess.Popen([sys.executable, "-c", _BURN])
            stack.callback(burner.wait)
            stack.callback(burner.kill)
        verdicts: collections.Counter[str] = collections.Counter()
        covered = 0
        for trial in range(given.trials):
            found = latency(files, seconds=given.seconds, seed=trial).comparisons[0]
            verdicts[found.verdict] += 1
            assert found.ratio.low is not None
            assert found.ratio.high is not None
            covered += found.ratio.low <= truth <= found.ratio.high
    right = "slower" if given.slower else "no difference"
    decided = given.trials - verdicts["too noisy"]
    told = {
        "trials": given.trials,
        "truth": truth,
        "load": given.load,
        "verdicts": dict(verdicts),
        "decided": decided,
        "wrong": decided - verdicts[right],
        "interval_covers_truth": covered,
    }
    print(json.dumps(told))


def written(layers: int, path: Path) -> str:
    """A file of equal layers."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()) for _ in range(layers))).eval()
    return export(net, torch.randn(2, 32, 16, 16), path).path


if __name__ == "__main__":
    main()
