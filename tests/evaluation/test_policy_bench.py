"""The commands of the policy bench, and its table."""

import importlib.util
import json
from pathlib import Path

import pytest

from como_jax.errors import RunError
from como_jax.evaluation.sweeps import policy_bench
from como_jax.evaluation.sweeps.policy_bench import Bench, Job, run_stage, write_tables


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("tabletop", tmp_path, ["diffusion", "vla"], [0, 1], episodes=2, steps=3)


def test_every_job_is_a_command_that_needs_only_what_earlier_stages_make(bench: Bench):
    made: set[str] = set()
    for jobs in bench.stages():
        for job in jobs:
            assert importlib.util.find_spec(job.command[0]) is not None
            for flag in job.command:
                name, _, value = flag.partition("=")
                if name in ("--data", "--config.init_from", "--config.encoder.init_from"):
                    assert {path.partition("=")[0] for path in value.split(",")} <= made, flag
        made |= {str(job.product.parent) for job in jobs}
    assert len([run for run in bench.runs if run[0] == "vla"]) == 2 * 4
    names = [job.name for jobs in bench.stages() for job in jobs]
    assert len(names) == len(set(names)) and {"robot", "ceiling", "encoder", "laq", "como_report"} <= set(names)


def test_a_stage_runs_what_is_missing_and_stops_at_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jobs = [Job(name, ("module", name), tmp_path / name / "finished") for name in ("done", "good", "bad")]
    for job in jobs:
        job.product.parent.mkdir()
    jobs[0].product.write_text("")
    asked = []

    def run_commands(commands, logs, count, environment):
        asked.extend(command[-1] for command in commands)
        yield from ((0, 0), (1, 7))

    monkeypatch.setattr(policy_bench, "run_commands", run_commands)
    with pytest.raises(RunError, match="bad failed with exit status 7; see .*bad.log"):
        run_stage(jobs, tmp_path / "logs", 2)
    assert asked == ["good", "bad"] and jobs[1].product.exists() and not jobs[2].product.exists()


def test_the_table_sums_over_seeds_and_tasks(bench: Bench):
    for seed, successes in enumerate((3, 5)):
        folder = bench.out / "rollouts" / f"diffusion_robot_{seed}"
        folder.mkdir(parents=True)
        rate = {"episodes": 11, "crashed": 1, "successes": successes, "mean_steps": 4.0}
        (folder / "summary.json").write_text(json.dumps({"tasks": {"tabletop:reach": rate}}))
    table = write_tables(bench)
    row = next(line for line in table.splitlines() if line.startswith("| diffusion | none |"))
    assert "| 2 of 2 | 40.0 ± 14.1 | 21.9 to 61.3 | 30.0, 50.0 | 40.0 |" in row
    assert (bench.out / "table.md").read_text() == table
    assert (bench.out / "table.csv").read_text().splitlines()[1] == "diffusion,robot,0,tabletop:reach,11,1,3,4.0"
