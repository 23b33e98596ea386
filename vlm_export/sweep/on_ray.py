"""Has jobs done by Ray: a task each, with its memory and cores declared, on this machine or on a cluster.

Ray decides where a task runs, and runs it again where its worker or its node is lost. A task takes a `Job`, plain
values, and gives an `Outcome`; models and weights stay on disk, where the operating system shows the same pages of a
base's file to every worker of a node.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import Any

from vlm_export.errors import InputError, one_line, reason
from vlm_export.machine import available_memory
from vlm_export.start.figures import size
from vlm_export.sweep.jobs import Job, Outcome

RETRIES = 3  # of a job whose worker or node is lost
_LOOPBACK = "127.0.0.1"
_STORE_BYTES = 80 << 20  # about the least that Ray takes: what goes through it is a few kB
_POLL_SECONDS = 5.0
_LOST_SECONDS = 60.0  # without a node that a job fits on, after which it fails
_PER_CORE = 2  # jobs that are handed to Ray for each core, so that none waits for us
# Read when Ray is imported, and by the processes that it starts.
_EVERYWHERE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": str(RETRIES),  # else without end
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a line of advice
}
# Ray 2.60 gives 127.0.0.1 up for the machine's own address, on which it then listens, but where it takes the machine
# for one that no cluster is made of, as Windows and macOS.
_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def _do(job: Job) -> Outcome:
    """Do a job, in a worker: who hands jobs over has no need of torch."""
    from vlm_export.sweep.stages import run

    return run(job)


class OnRay:
    """Ray's tasks; made by `on_ray`.

    `threads` are the cores of a job.
    """

    def __init__(self, ray: Any, threads: int):
        self._ray = ray
        self._threads = threads
        self._begun: dict[Any, Job] = {}
        self._failed: list[tuple[Job, Outcome]] = []
        self._run = ray.remote(max_retries=RETRIES, retry_exceptions=False)(_do)

    @property
    def slots(self) -> int:
        """How many jobs to hand over at a time."""
        cores = sum(self._resources("CPU")) / self._threads
        return max(2, int(cores * _PER_CORE))

    def begin(self, job: Job) -> None:
        """Hand a job to Ray, unless no node has what it needs."""
        if (why := self._impossible(job)) is not None:
            self._failed.append((job, Outcome("failed", why)))
            return
        task = self._run.options(name=job.title, num_cpus=self._cores(job), memory=job.need.memory_bytes)
        self._begun[task.remote(job)] = job

    def next(self) -> tuple[Job, Outcome]:
        """Wait for a job that ends; one that no node is left for ends, too, a minute later."""
        waited = 0.0
        while not self._failed:
            ended, _ = self._ray.wait(list(self._begun), num_returns=1, timeout=_POLL_SECONDS)
            if ended:
                job = self._begun.pop(ended[0])
                return job, self._outcome(job, ended[0])
            waited = waited + _POLL_SECONDS if any(map(self._impossible, self._begun.values())) else 0.0
            if waited >= _LOST_SECONDS:
                self._give_up()
        return self._failed.pop()

    def _outcome(self, job: Job, task: Any) -> Outcome:
        try:
            found = self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            first, *_ = str(error).splitlines() or [""]
            said = f"{job.stage}: its worker or node was lost, and it could not be done again: "
            return Outcome("failed", one_line(f"{said}{type(error).__name__}: {first}"))
        assert isinstance(found, Outcome)
        return found

    def _give_up(self) -> None:
        """Fail the jobs that no node is left for."""
        for task, job in list(self._begun.items()):
            if (why := self._impossible(job)) is not None:
                self._ray.cancel(task)
                del self._begun[task]
                self._failed.append((job, Outcome("failed", why)))

    def _impossible(self, job: Job) -> str | None:
        """Why no node that is alive can do a job, whatever else it does."""
        memory, cores = max(self._resources("memory"), default=0), max(self._resources("CPU"), default=0)
        if job.need.memory_bytes > memory:
            return (
                f"{job.stage}: needs {size(job.need.memory_bytes)} of memory, and no node has more than {size(memory)}"
            )
        if self._threads > cores:
            return f"{job.stage}: takes {self._threads} cores, and no node has more than {cores:.0f}: lower --threads"
        return None

    def _cores(self, job: Job) -> int:
        """Those that a job is given: all of the smallest node where it is measured, so that nothing runs beside it."""
        alone = int(min(self._resources("CPU"), default=1)) if job.stage == "bench" else 1
        return max(self._threads, alone)

    def _resources(self, name: str) -> list[float]:
        """Of each node that is alive, how much it has in all."""
        return [node["Resources"].get(name, 0) for node in self._ray.nodes() if node["Alive"]]


@contextmanager
def on_ray(address: str | None, threads: int) -> Iterator[OnRay]:
    """Ray on this machine, with all of its cores and the memory that is free, or the cluster at an address.

    On this machine nothing listens but on the loopback interface. Nothing is told to Ray's makers.

    Raises:
        InputError: Ray is not installed, or there is no cluster at that address.
    """
    check_installed()
    os.environ |= _EVERYWHERE | ({} if address else _ON_LOOPBACK)
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    try:
        if address is None:
            ray.init(
                address="local",  # else it would take what RAY_ADDRESS says
                num_cpus=os.cpu_count(),
                _memory=available_memory(),
                object_store_memory=_STORE_BYTES,
                _node_ip_address=_LOOPBACK,
                dashboard_host=_LOOPBACK,
                **quiet,
            )
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"--address {address}: no Ray cluster answers there" if address else "Ray does not start"
        raise InputError(f"{where}: {reason(error)}") from error
    try:
        with redirect_stdout(sys.stderr):  # where Ray tells of workers that died: stdout is for results
            yield OnRay(ray, threads)
    finally:
        ray.shutdown()


def check_installed() -> None:
    """Raises InputError where Ray is not installed."""
    if find_spec("ray") is None:
        raise InputError("Ray is not installed: `pip install 'vlm-export[sweep]'`, or do without it by --in-process")
