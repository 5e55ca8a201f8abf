"""A job in a fresh process: its answer, its progress, and every way it can go wrong."""

from pathlib import Path

import pytest

from metaprune.errors import InputError, ResourceError
from metaprune.measure.fresh import in_fresh_process


def script(folder: Path, body: str) -> Path:
    path = folder / "job.py"
    path.write_text(f"import json, os, sys, time, signal\njob = json.load(sys.stdin)\n{body}\n")
    return path


def test_answer_and_progress(tmp_path: Path) -> None:
    shares: list[float] = []
    job = script(tmp_path, "print('progress 0.5')\nprint('noise')\nprint(json.dumps({'twice': 2 * job['x']}))")
    assert in_fresh_process(job, {"x": 21}, limit_s=30, progress=shares.append) == {"twice": 42}
    assert shares == [0.5]


@pytest.mark.parametrize(
    ("body", "error", "rule"),
    [
        ("print(json.dumps({'refused': 'too small'}))", InputError, "too small"),
        ("raise ValueError('broken')", InputError, "ValueError: broken"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", InputError, "code -11"),
        ("os.kill(os.getpid(), signal.SIGKILL)", ResourceError, "memory"),
        ("sys.exit(0)", InputError, "no message"),
    ],
)
def test_failures_are_named(tmp_path: Path, body: str, error: type[Exception], rule: str) -> None:
    with pytest.raises(error, match=rule):
        in_fresh_process(script(tmp_path, body), {}, limit_s=30)


def test_a_limit_ends_it(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"within 0\.5 s"):
        in_fresh_process(script(tmp_path, "time.sleep(60)"), {}, limit_s=0.5)


def test_an_interrupt_leaves_no_process_behind(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def interrupt(share: float) -> None:
        raise KeyboardInterrupt

    body = f"open({str(pid_file)!r}, 'w').write(str(os.getpid()))\nprint('progress 0.1', flush=True)\ntime.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        in_fresh_process(script(tmp_path, body), {}, limit_s=30, progress=interrupt)
    assert not Path(f"/proc/{pid_file.read_text()}").exists()
