"""The commands of the policy bench, the file of its outcomes, and its table."""

import importlib.util
from pathlib import Path

import chex
import numpy as np
import pytest
from etils import epath

from como_jax.convert import catalog
from como_jax.errors import RunError, UsageError
from como_jax.evaluation.rollouts.results import EpisodeResult, episodes_csv
from como_jax.evaluation.sweeps import bench_results, policy_bench
from como_jax.evaluation.sweeps.bench_results import Episode, Run
from como_jax.evaluation.sweeps.policy_bench import ARMS, LABELLERS, SETTINGS, Bench, Job, run_stage
from tools.policy_bench import Outcomes


def make_bench(out: Path, env: str = "tabletop") -> Bench:
    return Bench(env, out, ["diffusion", "vla"], ARMS, [0, 1], episodes=2, steps=3)


@pytest.mark.parametrize("env", SETTINGS)
def test_every_job_is_a_command_that_needs_only_what_earlier_stages_make(env: str, tmp_path: Path):
    bench, made = make_bench(tmp_path, env), set()
    for jobs in bench.stages():
        for job in jobs:
            assert importlib.util.find_spec(job.command[0]) is not None
            for flag in job.command:
                name, _, value = flag.partition("=")
                if name in ("--data", "--workdir", "--config.init_from", "--config.encoder.init_from"):
                    needed = {path.partition("=")[0] for path in value.split(",")}
                    makes_it = name == "--workdir" and str(job.product.parent) in needed
                    assert makes_it or needed <= made, flag
        made |= {str(job.product.parent) for job in jobs}
    assert len([run for run in bench.runs if run.policy == "vla"]) == 2 * 4
    names = [job.name for jobs in bench.stages() for job in jobs]
    assert len(names) == len(set(names)) and {"robot", "ceiling", "encoder", "laq", "como_report"} <= set(names)
    assert SETTINGS[env].builder in catalog.BUILDERS


def test_videos_come_on_top_of_as_many_samples_of_the_robot(tmp_path: Path):
    jobs = {job.name: job for jobs in make_bench(tmp_path).stages() for job in jobs}

    def samples(arm: str) -> tuple[int, str]:
        flags = dict(flag.partition("=")[::2] for flag in jobs[f"diffusion_{arm}_0"].command)
        return int(flags["--config.data.batch_size"]), flags["--data"]

    assert samples("none") == (128, f"{tmp_path}/robot") and samples("ceiling") == (128, f"{tmp_path}/ceiling")
    assert samples("none_twice") == (256, f"{tmp_path}/robot")
    batch, data = samples("como")
    weights = [float(part.partition("=")[2] or 1) for part in data.split(",")]
    assert batch * weights[0] / sum(weights) == 128


def test_only_what_the_missing_runs_need_is_made(tmp_path: Path):
    bench = Bench("libero_goal", tmp_path, ["diffusion"], ["none", "como", "ceiling"], [0, 1], episodes=2)
    done = [run for run in bench.runs if run.arm != "none"]
    names = [job.name for jobs in bench.stages(done) for job in jobs]
    assert names == [
        "robot", *(f"{job}diffusion_none_{seed}" for seed in (0, 1) for job in ("", "rollout_"))
    ]  # fmt: skip
    assert not bench.stages(bench.runs)


def test_a_stage_runs_what_is_missing_and_stops_at_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jobs = [Job(name, ("module", name), tmp_path / name / "finished") for name in ("done", "good", "bad")]
    for job in jobs:
        job.product.parent.mkdir()
    jobs[0].product.write_text("")
    asked, ended = [], []

    def run_commands(commands, logs, count, environment):
        asked.extend(command[-1] for command in commands)
        yield from ((0, 0), (1, 7))

    monkeypatch.setattr(policy_bench, "run_commands", run_commands)
    with pytest.raises(RunError, match="bad failed with exit status 7; see .*bad.log"):
        run_stage(jobs, tmp_path / "logs", 2, lambda: ended.append(jobs[1].product.exists()))
    assert asked == ["good", "bad"] and ended == [True] and not jobs[2].product.exists()


def some_episodes(run: Run, successes: list[bool | None]) -> list[Episode]:
    places = [("s", str(task), state) for task in range(len(successes) // 2) for state in range(2)]
    return [Episode(*place, run.seed, run.policy, run.arm, each) for place, each in zip(places, successes, strict=True)]


def test_outcomes_of_rollouts_are_kept_in_a_file_that_says_what_is_complete(tmp_path: Path):
    run = Run("diffusion", "none", 1)
    results = [
        EpisodeResult("libero:libero_goal/3", 0, 7, steps=4, success=True),
        EpisodeResult("libero:libero_goal/3", 1, 8, steps=4),
        EpisodeResult("libero:libero_goal/10", 0, 7, reason="gone"),
    ]
    folder, path = tmp_path / "rollouts", tmp_path / "episodes.csv"
    assert bench_results.episodes_of_rollouts(folder, run) == bench_results.read_episodes(path) == []
    folder.mkdir()
    (folder / "episodes.csv").write_text(episodes_csv(results))
    found = bench_results.episodes_of_rollouts(folder, run)
    assert [(each.suite, each.task, each.state, each.success) for each in found] == [
        ("libero_goal", "3", 0, True), ("libero_goal", "3", 1, False), ("libero_goal", "10", 0, None)
    ]  # fmt: skip
    bench_results.write_episodes(path, [*found, *found[:1]])
    assert sorted(map(str, bench_results.read_episodes(path))) == sorted(map(str, found))
    assert bench_results.complete_runs(found, 3) == [run] and not bench_results.complete_runs(found, 4)
    path.write_text(path.read_text().replace(",3,1,", ",3,one,"))
    with pytest.raises(UsageError, match=r"episodes.csv, line \d: .*'one'.* is no outcome of an episode"):
        bench_results.read_episodes(path)
    path.write_text("task,success\n")
    with pytest.raises(UsageError, match="episodes.csv must be a table with the columns suite, task"):
        bench_results.read_episodes(path)


def test_outcomes_of_other_suites_and_days_stay_and_new_ones_are_added(tmp_path: Path):
    bench = Bench("libero_goal", tmp_path / "out", ["diffusion"], ["none", "como"], [0], episodes=1)
    none, como = bench.runs
    tasks = [str(task) for task in range(10)]
    known = [Episode("libero_goal", task, 0, none.seed, none.policy, none.arm, False) for task in tasks]
    other = [known[0]._replace(suite="libero_object")]
    path = epath.Path(tmp_path / "all.csv")
    bench_results.write_episodes(path, known + other)
    outcomes = Outcomes(bench, path)
    assert outcomes.complete() == [none]
    folder = bench.rollout_folder(como)
    folder.mkdir(parents=True)
    results = [EpisodeResult(f"libero:libero_goal/{task}", 0, 7, steps=4, success=True) for task in tasks]
    for ended in (results[:4], results):
        (folder / "episodes.csv").write_text(episodes_csv(ended))
        text = outcomes.collect()
    assert set(outcomes.complete()) == set(Outcomes(bench, path).complete()) == {none, como}
    assert len(bench_results.read_episodes(path)) == 21
    assert "+100.0 (+100.0 to +100.0)" in text and (bench.out / "table.md").read_text() == text


def test_pairs_are_compared_and_the_interval_is_that_of_drawing_them_again():
    rng = np.random.default_rng(0)
    outcomes = rng.random((2, 60)) < np.array([[0.7], [0.4]])
    ours, theirs = (some_episodes(Run("p", arm, 0), list(row)) for arm, row in zip("ab", outcomes, strict=True))
    # What has no partner says nothing.
    crashed = [theirs[0]._replace(success=None), *theirs[1:-1]]
    differences = outcomes[0, 1:-1].astype(float) - outcomes[1, 1:-1]
    drawn = rng.choice(differences, size=(20_000, len(differences))).mean(axis=1)
    expected = (differences.mean(), *np.quantile(drawn, [0.025, 0.975]))
    found = bench_results.paired_difference(ours, crashed[::-1])
    chex.assert_trees_all_close(found, expected, atol=0.02)
    assert bench_results.paired_difference(ours, theirs[:1]) is None
    assert bench_results.paired_difference(ours, ours) == (0, 0, 0)


def test_the_table_sums_over_seeds_and_tasks():
    # Of seven pairs of which five differ, three or more differ in 98 % of the draws.
    none = [*some_episodes(Run("p", "none", 0), [True, False] * 2), *some_episodes(Run("p", "none", 1), [False] * 4)]
    como = [*some_episodes(Run("p", "como", 0), [True] * 4), *some_episodes(Run("p", "como", 1), [True] * 3 + [None])]
    text = bench_results.table(none + como, ["none", "como", "vq"], {"como": {"lp_mse": 0.5, "s_pcfc": -0.25}})
    first, second = text.splitlines()[2:]
    assert first == "| p | none | 25.0 ± 35.4 | 7.1 to 59.1 | 50.0, 0.0 |  | 25.0 | 25.0 |  |  |"
    assert second.startswith(
        "| p | como | 100.0 ± 0.0 | 64.6 to 100.0 | 100.0, 100.0 | +71.4 (+42.9 to +100.0) | 100.0 |"
    )
    assert second.endswith("| 0.5000 | -0.25 |")


def test_arms_are_those_of_some_policy():
    assert set(ARMS) == {arm for policy in LABELLERS for arm in policy_bench.arms_of(policy)}
