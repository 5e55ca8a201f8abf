"""The child process of latency and memory: loads ONNX files with onnxruntime, and times or weighs them.

Run by path, with nothing but the standard library, numpy and onnxruntime, so that neither torch nor this package sits
in the caches or in the resident set. Reads a job as JSON, writes the answer as JSON (see `fresh.py`).
"""

import gc
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class Refused(Exception):
    """The job cannot be done as it was given."""


def main() -> None:
    """Read the job, do it, answer."""
    job = json.load(sys.stdin)
    try:
        answer = {"memory": weigh, "latency": clock, "profile": look_inside}[job["kind"]](job)
    except Refused as refusal:
        answer = {"refused": str(refusal)}
    print(json.dumps(answer), flush=True)


def clock(job: dict[str, Any]) -> dict[str, Any]:
    """Single-call times of all arms, in random order within each round."""
    core = pin() if job["pin"] else None
    arms = [load(path, job) for path in job["paths"]]
    calls = [(session, feeds_of(session, path, job)) for session, path in zip(arms, job["paths"])]
    for (session, feeds), path in zip(calls, job["paths"]):
        first_call(session, feeds, path)
        warm_up(session, feeds)
    order = random.Random(job["seed"])
    steal, switches = stolen(), involuntary_switches()
    gc.disable()
    wall_RA: list[list[int]] = []
    cpu_RA: list[list[int]] = []
    start = said = time.perf_counter()
    while True:
        wall, cpu = [0] * len(calls), [0] * len(calls)
        for arm in order.sample(range(len(calls)), len(calls)):
            session, feeds = calls[arm]
            cpu_start, wall_start = time.thread_time_ns(), time.perf_counter_ns()
            session.run(None, feeds)
            wall[arm] = time.perf_counter_ns() - wall_start
            cpu[arm] = time.thread_time_ns() - cpu_start
        wall_RA.append(wall)
        cpu_RA.append(cpu)
        now = time.perf_counter()
        share = min(len(wall_RA) / job["rounds"], (now - start) / job["seconds"])
        if share >= 1 or now - start >= job["limit_s"]:
            break
        if now - said > 0.25:
            said = now
            print(f"progress {share:.3f}", flush=True)
    return {
        "wall_ns": wall_RA,
        "cpu_ns": cpu_RA,
        "core": core,
        "steal_ticks": None if steal is None else (stolen() or 0) - steal,
        "involuntary_switches": None if switches is None else (involuntary_switches() or 0) - switches,
        "runtime": runtime_version(),
    }


def weigh(job: dict[str, Any]) -> dict[str, Any]:
    """Load time and resident memory of one session after its first call."""
    import numpy  # noqa: F401  (both imports belong to the base, not to the file)
    import onnxruntime  # noqa: F401

    (path,) = job["paths"]
    base = resident("VmRSS" if forget_peak() else "VmHWM")
    start = time.perf_counter()
    session = load(path, job)
    load_ms = 1e3 * (time.perf_counter() - start)
    first_call(session, feeds_of(session, path, job), path)
    peak = resident("VmHWM")
    return {"load_ms": load_ms, "base_bytes": base, "peak_bytes": peak, "runtime": runtime_version()}


def look_inside(job: dict[str, Any]) -> dict[str, Any]:
    """Times of every node over a number of calls, as onnxruntime tells them; calls before the last ones warm up."""
    pin()
    (path,) = job["paths"]
    with tempfile.TemporaryDirectory(prefix="metaprune-") as folder:
        session = load(path, job, profile=f"{folder}/profile")
        feeds = feeds_of(session, path, job)
        first_call(session, feeds, path)
        for _ in range(job["rounds"] + 10):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    calls: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        told = event["args"]
        name = event["name"].removesuffix("_kernel_time")
        node = calls.setdefault(told["node_index"], {"name": name, "operator": told["op_name"], "us": []})
        node["us"].append(event["dur"])
        node["inputs"] = [shape for port in told.get("input_type_shape", ()) for shape in port.values()]
        node["outputs"] = [shape for port in told.get("output_type_shape", ()) for shape in port.values()]
    return {
        "nodes": [{**node, "us": node["us"][-job["rounds"] :]} for node in calls.values()],
        "runtime": runtime_version(),
    }


def load(path: str, job: dict[str, Any], profile: str | None = None) -> Any:
    """A session on the processor alone: other providers would be another device under the same name."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    options.intra_op_num_threads = job["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise Refused(f"onnxruntime must load {Path(path).name!r}, but says: {reason}") from error


def feeds_of(session: Any, path: str, job: dict[str, Any]) -> dict[str, Any]:
    """One input for every port: normal noise for floats, ones for integers (a legal token, a mask of all)."""
    import numpy as np

    noise, feeds = np.random.default_rng(job["seed"]), {}
    for port in session.get_inputs():
        if port.type not in _TYPES:
            raise Refused(
                f"input {port.name!r} of {Path(path).name!r} has the type {port.type}; give tensors of numbers."
            )
        shape = [size_of(port, axis, size, path, job) for axis, size in enumerate(port.shape)]
        kind = np.dtype(_TYPES[port.type])
        feeds[port.name] = noise.standard_normal(shape).astype(kind) if kind.kind == "f" else np.ones(shape, kind)
    return feeds


def size_of(port: Any, axis: int, size: Any, path: str, job: dict[str, Any]) -> int:
    """The size of one dimension: fixed by the file, named in the job, or the batch in front."""
    if isinstance(size, int):
        return size
    if size in job["sizes"]:
        return int(job["sizes"][size])
    if axis == 0:
        return int(job["batch"])
    raise Refused(
        f"every free dimension needs a size, but {size!r} (axis {axis} of input {port.name!r} in {Path(path).name!r}) "
        f"has none. Give it, e.g. sizes={{{str(size)!r}: 64}}."
    )


def first_call(session: Any, feeds: Any, path: str) -> None:
    """One call that may fail: sizes that do not fit together show here."""
    try:
        session.run(None, feeds)
    except Exception as error:
        shapes = {name: list(value.shape) for name, value in feeds.items()}
        reason = str(error).strip().splitlines()[0]
        raise Refused(f"{Path(path).name!r} must run on inputs of {shapes}, but onnxruntime says: {reason}") from error


def warm_up(session: Any, feeds: Any, least: int = 10, most: int = 200, limit_s: float = 5.0) -> None:
    """At least ten calls, then until the last five agree within 5 %, or the limit."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < most and time.perf_counter() - start < limit_s:
        begin = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - begin)
        if len(times) >= least and max(times[-5:]) <= 1.05 * min(times[-5:]):
            return


def pin() -> int | None:
    """Bind this process to the allowed core that idled most over 50 ms; None where the system has no affinity."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    allowed = sorted(os.sched_getaffinity(0))
    before = idle_ticks()
    time.sleep(0.05)
    after = idle_ticks()
    core = max(allowed, key=lambda index: after.get(index, 0) - before.get(index, 0))
    os.sched_setaffinity(0, {core})
    return core


def idle_ticks() -> dict[int, int]:
    """Idle time of each core so far, in clock ticks."""
    lines = (line.split() for line in proc("/proc/stat") if line.startswith("cpu") and not line.startswith("cpu "))
    return {int(fields[0][3:]): int(fields[4]) for fields in lines}


def stolen() -> int | None:
    """Ticks that the hypervisor gave to others so far."""
    for line in proc("/proc/stat"):
        if line.startswith("cpu "):
            return int(line.split()[8])
    return None


def involuntary_switches() -> int | None:
    """How often the scheduler took the core away from this process so far."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def forget_peak() -> bool:
    """Reset the peak of the resident set, so that what the imports needed for a moment hides nothing."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def resident(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None outside Linux."""
    for line in proc("/proc/self/status"):
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def proc(path: str) -> list[str]:
    """Lines of a kernel file, none where it does not exist."""
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def runtime_version() -> str:
    """Name and version of the runtime."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


if __name__ == "__main__":
    main()
