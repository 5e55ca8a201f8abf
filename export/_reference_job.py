"""The child process of the third opinion: runs a file with the slow evaluator that comes with ONNX itself.

Run by path in a fresh process, because it cannot be interrupted otherwise: on a big network it takes minutes. Reads a
job as JSON, the inputs and the outputs lie in archives of arrays.
"""

import json
import sys
import warnings


def main() -> None:
    """Read the job, run the file, answer."""
    import numpy as np
    from onnx.reference import ReferenceEvaluator

    job = json.load(sys.stdin)
    warnings.simplefilter("ignore")
    try:
        evaluator = ReferenceEvaluator(job["path"])
        with np.load(job["feeds"]) as archive:
            feeds = {name: archive[f"arr_{index}"] for index, name in enumerate(job["names"])}
        outputs = evaluator.run(None, feeds)
    except Exception as error:  # an operator that it does not know, or knows in another version
        print(json.dumps({"refused": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}))
        return
    np.savez(job["outputs"], *outputs)
    print(json.dumps({"done": True}))


if __name__ == "__main__":
    main()
