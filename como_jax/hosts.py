"""Several processes that work as one job: how they find each other, and how they agree.

A process finds its job in the flags of the command, or in what its launcher sets: Cloud TPU, GKE, Slurm or Open MPI. A
process without a job contacts no other process and waits for none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from como_jax.errors import ConfigError, RunError, UsageError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_COORDINATOR_VARIABLE = "JAX_COORDINATOR_ADDRESS"
_ALONE = "`num_processes`=1 runs it alone"


@dataclasses.dataclass(frozen=True)
class Job:
    """A job of several processes, and the place of this process in it. JAX finds out itself what is None.

    Attributes:
      coordinator: HOST:PORT of the first process.
      num_processes: number of processes in the job.
      process_id: number of this process, from 0.
      launcher: JAX's name of the launcher, or "deactivate" if there is none that JAX could ask.
      local_devices: numbers of the GPUs of this machine that this process uses; empty for all of them.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    launcher: str = "deactivate"
    local_devices: tuple[int, ...] | None = None


def define_flags() -> None:
    """Defines the flags that say which job a process belongs to; `connect` reads them."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes [that of the launcher].")
    flags.DEFINE_integer("num_processes", None, "Processes of the job [those of the launcher]; 1 runs one alone.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0 [that of the launcher].")


def connect(*, share_sigterm: bool = False) -> None:
    """Joins the job that this process belongs to, if there is one. Call it before JAX makes its first array.

    From then on, all hosts but the first log nothing but errors.

    Args:
      share_sigterm: SIGTERM to one process does not end it, but makes all agree on a step to stop at; see
        `como_jax.training.monitors.StopRequest`.

    Raises:
      ConfigError: flags and environment lack something that is needed, or the other processes cannot be reached.
    """
    given = flags.FLAGS
    job = find_job(given.coordinator, given.num_processes, given.process_id, os.environ)
    if job is None:
        return
    jax.config.update("jax_enable_preemption_service", share_sigterm)
    try:
        jax.distributed.initialize(
            job.coordinator,
            job.num_processes,
            job.process_id,
            local_device_ids=None if "JAX_LOCAL_DEVICE_IDS" in os.environ else job.local_devices,
            cluster_detection_method=None if job.launcher == "tpu" else job.launcher,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"This process cannot join its job; {_ALONE}: {_first_line(error)}") from error
    if not is_first():
        _log_errors_alone()


def find_job(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> Job | None:
    """Returns the job that this process belongs to, or None for a process on its own.

    Args:
      coordinator, num_processes, process_id: values of the flags, which take precedence over the environment.
      environment: environment variables.

    Raises:
      ConfigError: something that is needed is missing, or a value is impossible.
    """
    if num_processes == 1:
        return None
    job = _from_launcher(environment) or Job()
    given = {
        "coordinator": coordinator or environment.get(_COORDINATOR_VARIABLE),
        "num_processes": num_processes,
        "process_id": process_id,
    }
    job = dataclasses.replace(job, **{name: value for name, value in given.items() if value is not None})
    if job == Job():
        return None
    if job.launcher == "deactivate":
        missing = [f"`{name}`" for name in given if getattr(job, name) is None]
        if missing:
            raise ConfigError(f"A job of several processes needs {' and '.join(missing)} too; {_ALONE}.")
    _check_coordinator(job.coordinator)
    count, number = job.num_processes, job.process_id
    if count is not None and number is not None and not 0 <= number < count:
        raise ConfigError(f"`process_id` {number} must lie between 0 and `num_processes` {count}.")
    return job


def _check_coordinator(address: str | None) -> None:
    host, _, port = (address or "localhost:0").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"`coordinator` {address} must be HOST:PORT, as in 10.0.0.1:1234.")


def _from_launcher(environment: Mapping[str, str]) -> Job | None:
    """The job that the environment describes, if any."""
    for find in (_from_tpu, _from_slurm, _from_open_mpi):
        job = find(environment)
        if job is not None:
            return job
    return None


def _from_tpu(environment: Mapping[str, str]) -> Job | None:
    """The job of a TPU slice; JAX reads the rest from GKE's variables or from the metadata of the virtual machine."""
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return None
    # When it is imported, JAX sets this variable if it sees no TPU; nothing else can be known without the network.
    if "TPU_SKIP_MDS_QUERY" not in environment:
        return Job(launcher="tpu")
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    count = len(hosts.split(",")) * int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    if count < 2:
        return None
    _require(environment, "GKE", f"names {count} hosts", "TPU_WORKER_ID")
    return Job(launcher="tpu")


def _from_slurm(environment: Mapping[str, str]) -> Job | None:
    """The job of `srun`, which starts one process for every task."""
    count = int(environment.get("SLURM_NTASKS") or 1)
    if "SLURM_JOB_ID" not in environment or count < 2:
        return None
    if "SLURM_STEP_NODELIST" not in environment:
        raise ConfigError(f"Slurm has {count} tasks, but this process is none of them: start it with srun; {_ALONE}.")
    _require(environment, "Slurm", f"has {count} tasks", "SLURM_PROCID", "SLURM_LOCALID")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")
    alone = all(node.partition("(")[0] == "1" for node in tasks)
    return Job(
        num_processes=count,
        process_id=int(environment["SLURM_PROCID"]),
        launcher="slurm",
        # JAX would give each process one GPU, even if it is the only process of its machine.
        local_devices=() if alone else (int(environment["SLURM_LOCALID"]),),
    )


def _from_open_mpi(environment: Mapping[str, str]) -> Job | None:
    """The job of `mpirun`."""
    count = int(environment.get("OMPI_COMM_WORLD_SIZE") or 1)
    if count < 2:
        return None
    _require(environment, "Open MPI", f"has {count} processes", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    alone = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    return Job(
        num_processes=count,
        process_id=int(environment["OMPI_COMM_WORLD_RANK"]),
        # JAX derives the coordinator from this variable, which Open MPI 5 no longer sets.
        launcher="ompi" if "OMPI_MCA_orte_hnp_uri" in environment else "deactivate",
        local_devices=() if alone else (int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]),),
    )


def _require(environment: Mapping[str, str], launcher: str, says: str, *names: str) -> None:
    missing = [name for name in names if name not in environment]
    if missing:
        raise ConfigError(f"{launcher} {says}, but {' and '.join(missing)} is not set; {_ALONE}.")


def is_first() -> bool:
    """Whether this is the process that writes logs and files for all."""
    return jax.process_index() == 0


def which(flag: bool) -> list[int]:
    """Returns the numbers of the hosts that call this with True. All hosts must call it together."""
    return np.flatnonzero(np.atleast_1d(multihost_utils.process_allgather(np.array(flag)))).tolist()


def local_mesh(mesh: Mesh) -> Mesh:
    """A mesh of the devices of this host alone, over which parameters are split; `mesh` itself if there is one host."""
    if jax.process_count() == 1:
        return mesh
    devices = np.array(jax.local_devices()).reshape(1, -1, 1)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def gather(tree: Any) -> Any:
    """Returns arrays that may be split over all hosts as NumPy arrays, whole on each; all hosts call it together."""
    return multihost_utils.process_allgather(tree, tiled=True)


@contextlib.contextmanager
def in_step(error: type[UsageError] = RunError) -> Iterator[None]:
    """Waits until all hosts have left this block. If one host fails in it, the others fail too and do not wait forever.

    Raises:
      UsageError: another host has failed; its type is `error`.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as caught:
        failure = caught
    failed = which(failure is not None)
    if failure is not None:
        raise failure
    if failed:
        raise error(f"host {failed[0]} has failed; its own output says why.")


def together(items: Iterable[T]) -> Iterator[T]:
    """Yields the items, of which all hosts have equally many. If one host fails at an item, so do the others.

    Raises:
      RunError: another host has failed.
    """
    iterator = iter(items)
    while True:
        with in_step():
            found = list(itertools.islice(iterator, 1))
        if not found:
            return
        yield found[0]


def _log_errors_alone() -> None:
    """Lets the first host alone log what all hosts would log."""
    logger = logging.getLogger("como_jax")
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        handler.setFormatter(logging.Formatter(f"host {jax.process_index()}: %(message)s"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
