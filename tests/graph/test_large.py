"""A network far larger than memory is read without it."""

import json
import subprocess
import sys

import pytest

CODE = """
import json, resource, time, torch
import numpy as np
from metaprune import zoo
from metaprune.graph import trace
trace(zoo.build("llama_tiny"), zoo.example_inputs("llama_tiny"))
sizes = dict(vocabulary=32000, width=4096, depth=32, num_heads=32, num_kv_heads=32, hidden=11008)
with torch.device("meta"):
    model, tokens = zoo.build("llama_tiny", **sizes), torch.zeros(1, 64, dtype=torch.int64)
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
net = trace(model, tokens)
cost = net.cost()
less = [axis.size // 2 if axis.prunable else axis.size for axis in net.axes]
many = net.cost_many(np.array([less] * 1000))
print(json.dumps({
    "seconds": time.process_time() - start,
    "bytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
    "params": cost.params,
    "less": int(many.params[0]),
    "hidden": [axis.size for axis in net.axes if "mlp" in axis.name],
}))
"""


@pytest.mark.long
def test_a_decoder_of_seven_billion_parameters_is_traced_in_little_time_and_memory():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert seen["params"] == 6_738_415_616
    assert seen["hidden"] == [11008] * 32
    assert seen["less"] < 0.3 * seen["params"]
    assert seen["seconds"] < 20
    assert seen["bytes"] < 1e9
