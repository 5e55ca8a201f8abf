"""Runs the network beside this file, with onnxruntime and numpy alone (pip install onnxruntime numpy).

python run.py                                 the example, which must give what it gave when this was made
python run.py INPUTS.npz OUT.npz [FILE.onnx]  your own inputs, by name
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

HERE = Path(__file__).parent


def run(inputs: dict[str, np.ndarray], name: str = "model.onnx") -> dict[str, np.ndarray]:
    """Outputs by name, for inputs by name."""
    session = onnxruntime.InferenceSession(HERE / name, providers=["CPUExecutionProvider"])
    return dict(zip((port.name for port in session.get_outputs()), session.run(None, inputs)))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        np.savez(sys.argv[2], **run(dict(np.load(sys.argv[1])), *sys.argv[3:4]))  # type: ignore[arg-type]
    else:
        for name, value in run(dict(np.load(HERE / "example.npz"))).items():
            wanted = np.load(HERE / "expected.npz")[name]
            if not np.allclose(value, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max()):
                sys.exit(f"{name} is wrong")
            print(f"{name} {value.shape} is right")
