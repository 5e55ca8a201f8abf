"""Jobs over processes, one thread each; they end with the process that began them, however that ends."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.synchronize import Event
from typing import Any

import torch

from metaprune.data import Dataset, load
from metaprune.errors import ResourceError
from metaprune.metatrain._training import Job
from metaprune.recovery import NoProgress, Progress

GPU_WORKERS = 4  # networks of this size leave most of a GPU idle


def number_of_workers(asked: int | None, jobs: int, device: torch.device) -> int:
    """As many as were asked for, else as there are cores; never more than jobs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(jobs, asked or (cores if device.type == "cpu" else min(cores, GPU_WORKERS))))


def run_jobs(
    jobs: Sequence[Job], data: Dataset, workers: int, device: torch.device, progress: Progress
) -> dict[str, str]:
    """Do all jobs.

    Args:
        jobs: What is to be done.
        data: What all of them train on.
        workers: Processes; with 1, this one works.
        device: Where to train.
        progress: Is told about every job that is done.

    Returns:
        Why those failed that did, by name.

    Raises:
        ResourceError: Memory or disk is full.
    """
    failed: dict[str, str] = {}
    if not jobs:
        return failed
    progress.start(len(jobs), "networks", "training the population")
    try:
        for name, why in _outcomes(jobs, data, workers, device):
            if why is not None:
                failed[name] = why
            progress.advance(1, f"{name}: {why or 'ready'}")
    finally:
        progress.close()
    return failed


def _outcomes(
    jobs: Sequence[Job], data: Dataset, workers: int, device: torch.device
) -> Iterator[tuple[str, str | None]]:
    if workers == 1:
        with _repeatable():
            for job in jobs:
                yield job.name, job.run(data, device, NoProgress())
        return
    yield from over_processes(_run_in_worker, {job.name: (job, device) for job in jobs}, workers, patient=True)


def over_processes(
    work: Callable[..., str | None], tasks: Mapping[str, tuple[Any, ...]], workers: int, *, patient: bool
) -> Iterator[tuple[str, str | None]]:
    """Do `work` for every task; names of tasks and why they failed, None if not, in the order in which they end.

    Args:
        work: A function of a module.
        tasks: Its arguments, by name of the task.
        workers: Processes.
        patient: When this ends early, workers are asked to end, and waited for; if not, they are ended.

    Raises:
        ResourceError: A process was killed.
    """
    others = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()

    def end() -> None:
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()

    with ProcessPoolExecutor(workers, spawn, begin_worker, (stop,)) as pool:
        try:
            with interrupts_ignored():
                running = {pool.submit(work, *arguments): task for task, arguments in tasks.items()}
            for future in as_completed(running):
                yield running[future], future.result()
        except BrokenProcessPool as error:
            end()  # the pool forgets a worker that was about to begin when another one died, and would wait for it
            raise ResourceError(
                "a process that works was killed, most likely for memory. Use fewer workers; what is ready stays."
            ) from error
        except BaseException:
            stop.set()  # those who are patient write their checkpoints
            pool.shutdown(wait=False, cancel_futures=True)
            if not patient:
                end()
            raise


@contextmanager
def _repeatable() -> Iterator[None]:
    """One thread and repeatable kernels, so that a network does not depend on what else this machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Processes that begin meanwhile ignore Ctrl-C from their first moment: it is for this one, which ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_stop: Event | None = None


def begin_worker(stop: Event) -> None:
    """Ctrl-C is for the parent, which tells its workers; they end with it, also when it is killed."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def end_with_the_parent() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()


def _run_in_worker(job: Job, device: torch.device) -> str | None:
    with _repeatable():
        return job.run(_dataset(job.data), device, _UntilStopped())


@cache
def _dataset(spec: str) -> Dataset:
    return load(spec)


class _UntilStopped(NoProgress):
    """Ends the work between two steps once the parent says so."""

    def advance(self, amount: int = 1, status: str = "") -> None:
        """Interrupt, if that was asked for."""
        if _stop is not None and _stop.is_set():
            raise KeyboardInterrupt
