"""Which job a process belongs to, from flags and environments, and what is said of those that are half set."""

from __future__ import annotations

import pytest

from como_jax import hosts
from como_jax.errors import ConfigError, OutputError
from como_jax.hosts import Job, find_job

# What JAX sets on import on a machine without a TPU.
LAPTOP = {"TPU_SKIP_MDS_QUERY": "1"}
GKE = {"TPU_SKIP_MDS_QUERY": "true", "TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
SLURM = {
    **LAPTOP,
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "n[1-4]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
MPI = {
    **LAPTOP,
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
}


def without(environment: dict[str, str], *names: str, **more: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names} | more


@pytest.mark.parametrize(
    "environment",
    [
        LAPTOP,
        {**LAPTOP, "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        # A shell within an allocation of one task, and a machine with chips that are not used.
        {**SLURM, "SLURM_NTASKS": "1"},
        {"JAX_PLATFORMS": "cpu"},
        {**LAPTOP, "KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"},
    ],
)
def test_a_process_on_its_own_has_no_job(environment: dict[str, str]) -> None:
    assert find_job(None, None, None, environment) is None


def test_flags_make_a_job_anywhere() -> None:
    assert find_job("h:1", 2, 0, LAPTOP) == Job("h:1", 2, 0)
    assert find_job("h:1", 2, 0, {"JAX_PLATFORMS": "cpu"}).launcher == "deactivate"


@pytest.mark.parametrize("environment", [GKE, SLURM, MPI])
def test_a_process_of_a_launcher_can_be_told_to_run_alone(environment: dict[str, str]) -> None:
    assert find_job(None, 1, None, environment) is None


@pytest.mark.parametrize(
    ("environment", "job"),
    [
        (GKE, Job(launcher="tpu")),
        ({**GKE, "TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Job(launcher="tpu")),
        # The virtual machine of a TPU, whose metadata JAX asks.
        ({}, Job(launcher="tpu")),
        # One process a machine takes all its GPUs, several take one each.
        (SLURM, Job(None, 4, 2, "slurm", ())),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}, Job(None, 4, 2, "slurm", (1,))),
        (MPI, Job(None, 4, 3, "ompi", (1,))),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Job(None, 4, 3, "ompi", ())),
    ],
)
def test_launchers_are_recognised(environment: dict[str, str], job: Job) -> None:
    assert find_job(None, None, None, environment) == job


def test_a_coordinator_may_be_named_beside_a_launcher() -> None:
    newer = without(MPI, "OMPI_MCA_orte_hnp_uri")
    assert find_job("h:1", None, None, newer) == Job("h:1", 4, 3, "deactivate", (1,))
    assert find_job(None, None, None, {**newer, "JAX_COORDINATOR_ADDRESS": "h:1"}).coordinator == "h:1"


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        (("h:1", None, None), LAPTOP, "needs `num_processes` and `process_id` too; `num_processes`=1 runs it alone"),
        ((None, 2, 0), LAPTOP, "needs `coordinator` too"),
        ((None, None, 1), LAPTOP, "needs `coordinator` and `num_processes` too"),
        ((None, None, None), {**LAPTOP, "JAX_COORDINATOR_ADDRESS": "h:1"}, "needs `num_processes` and `process_id`"),
        (("h", 2, 0), LAPTOP, "`coordinator` h must be HOST:PORT, as in"),
        (("h:1", 2, 2), LAPTOP, "`process_id` 2 must lie between 0 and `num_processes` 2"),
        ((None, None, None), without(SLURM, "SLURM_STEP_NODELIST"), "Slurm has 4 tasks.*start it with srun"),
        ((None, None, None), without(SLURM, "SLURM_PROCID"), "Slurm has 4 tasks, but SLURM_PROCID is not set"),
        ((None, None, None), without(MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK is not set"),
        ((None, None, None), without(MPI, "OMPI_MCA_orte_hnp_uri"), "needs `coordinator` too"),
        ((None, None, None), without(GKE, "TPU_WORKER_ID"), "GKE names 2 hosts, but TPU_WORKER_ID is not set"),
    ],
)
def test_what_is_half_set_is_refused(
    given: tuple[str | None, int | None, int | None], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_job(*given, environment)


def test_a_part_that_fails_raises_its_own_error() -> None:
    with pytest.raises(ZeroDivisionError), hosts.in_step(OutputError):
        _ = 1 / 0
    with hosts.in_step():
        pass
    assert hosts.which(True) == [0] and hosts.which(False) == []


def test_items_are_taken_one_by_one_until_one_fails() -> None:
    taken = hosts.together(6 // number for number in (1, 2, 0))
    assert [next(taken), next(taken)] == [6, 3]
    with pytest.raises(ZeroDivisionError):
        next(taken)
    assert list(hosts.together([])) == []
