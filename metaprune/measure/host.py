"""The machine that a number was measured on, in words that identify hardware and load but no person."""

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_ISA = ("avx512f", "avx512_vnni", "avx_vnni", "avx2", "asimd", "asimddp", "i8mm", "sve")


@dataclass(frozen=True, kw_only=True)
class Host:
    """One machine at one moment.

    Args:
        cpu: Model name of the processor.
        machine: Instruction set family, e.g. ``"x86_64"``.
        isa: Vector extensions that matter for kernels.
        cores: Logical cores.
        usable_cores: Those that this process may use.
        governor: Frequency governor, or None where it cannot be read.
        load_1min: Load average over the last minute, or None where there is none.
        system: Operating system and release.
        python: Version of Python.
    """

    cpu: str
    machine: str
    isa: tuple[str, ...]
    cores: int
    usable_cores: int
    governor: str | None
    load_1min: float | None
    system: str
    python: str

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


def host() -> Host:
    """This machine, now. What the system does not tell is None or empty, never guessed."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    cores = os.cpu_count() or 1
    return Host(
        cpu=info.get("model name") or platform.processor() or "unknown",
        machine=platform.machine(),
        isa=tuple(name for name in _ISA if name in flags),
        cores=cores,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        governor=_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        load_1min=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if ":" in line)
    first: dict[str, str] = {}
    for key, _, value in pairs:
        first.setdefault(key.strip(), value.strip())
    return first


def _line(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None
