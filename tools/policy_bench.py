"""Does latent motion of videos make a policy better? Demonstrations, videos, labellers, policies, success: one command.

    python -m tools.policy_bench --env libero_spatial --out runs/bench --policies diffusion --arms none,como,ceiling
    python -m tools.policy_bench --env tabletop --out runs/bench_tabletop --seeds 0
    python -m tools.policy_bench --env smoke --out runs/bench_smoke --episodes 1

Builds the datasets, trains the models that label videos and the policies that learn from them, rolls the policies out,
and writes OUT/table.md and the outcome of every episode; `como_jax.evaluation.sweeps.policy_bench` says what the arms
are. What is finished stays as it is, so that the same command resumes after a stop. With --results, outcomes are added
to that file as runs end, and runs that are complete in it are not run again, on whatever machine they were. The file
does not say how long policies were trained: keep one for each value of --steps.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from etils import epath

from como_jax import cli
from como_jax.errors import ConfigError, RunError
from como_jax.evaluation.sweeps import bench_results
from como_jax.evaluation.sweeps.policy_bench import ARMS, LABELLERS, RECIPES, SETTINGS, Bench, run_stage
from como_jax.files import write_text
from como_jax.ownership import claim

logger = logging.getLogger("como_jax.policy_bench")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_enum("env", "tabletop", tuple(SETTINGS), "Simulator or suite.")
    flags.DEFINE_string("out", None, "Directory of everything.", required=True)
    flags.DEFINE_list("policies", ["diffusion", "autoregressive"], f"Of {', '.join(LABELLERS)}.")
    flags.DEFINE_list("arms", list(ARMS), "What policies are trained on; each has those that it can learn from.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the policies; data and labellers are the same for all.")
    flags.DEFINE_integer("episodes", 20, "Rollouts of every task, policy and seed.", lower_bound=1)
    flags.DEFINE_integer("steps", 0, "Updates of every policy; 0 for those of the simulator's setting.", lower_bound=0)
    flags.DEFINE_integer("processes", 2, "Commands at once, each on an equal share of the cores.", lower_bound=1)
    flags.DEFINE_string("results", None, "CSV of all episodes, which is read and added to [OUT/episodes.csv].")
    flags.DEFINE_bool("table_only", False, "Run nothing, only tabulate what is there.")


class Outcomes:
    """The file of outcomes, and the table beside the bench."""

    def __init__(self, bench: Bench, path: epath.Path):
        """Reads what is known.

        Raises:
          UsageError: the file is no table of outcomes.
        """
        self._bench, self._path = bench, path
        self._known = bench_results.read_episodes(path)

    def mine(self) -> list[bench_results.Episode]:
        """The episodes of this simulator or suite."""
        suite = self._bench.setting.suite
        return [episode for episode in self._known if episode.suite == suite]

    def collect(self) -> str:
        """Adds what rollouts have found since, writes file and table, and returns the table."""
        bench = self._bench
        complete = self.complete()
        for run in bench.runs:
            if run not in complete:
                found = bench_results.episodes_of_rollouts(bench.rollout_folder(run), run)
                places = {(episode.run, episode.place) for episode in found}
                self._known = [episode for episode in self._known if (episode.run, episode.place) not in places]
                self._known += found
        metrics = {name: bench_results.read_metrics(bench.report_folder(name)) for name in RECIPES}
        text = bench_results.table(self.mine(), ARMS, metrics)
        bench_results.write_episodes(self._path, self._known)
        write_text(bench.out / "table.md", text)
        return text

    def complete(self) -> list[bench_results.Run]:
        """The runs of which all episodes are known."""
        return bench_results.complete_runs(self.mine(), self._bench.setting.tasks * self._bench.episodes)


def main(arguments: Sequence[str]) -> None:
    """Reads the flags and runs the bench."""
    cli.no_arguments(arguments)
    values = flags.FLAGS
    _check_names("policies", values.policies, LABELLERS)
    _check_names("arms", values.arms, ARMS)
    if not all(seed.isdecimal() for seed in values.seeds):
        raise ConfigError(f"--seeds must be whole numbers, not {','.join(values.seeds)}.")
    out = Path(values.out).resolve()
    seeds = [int(seed) for seed in values.seeds]
    bench = Bench(values.env, out, values.policies, values.arms, seeds, values.episodes, values.steps)
    if values.table_only and not out.exists() and not values.results:
        raise RunError(f"--out {values.out} does not exist, so there is nothing to tabulate.")
    out.mkdir(parents=True, exist_ok=True)
    claim(epath.Path(out), ("table.md", "episodes.csv"))
    outcomes = Outcomes(bench, epath.Path(values.results or out / "episodes.csv"))
    # SIGTERM ends the running commands as Ctrl-C does; they save their state in both cases.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not values.table_only:
        try:
            for jobs in bench.stages(outcomes.complete()):
                run_stage(jobs, out / "logs", values.processes, outcomes.collect)
        except KeyboardInterrupt:
            logger.info("Stopped; run the same command to go on.")
            sys.exit(130)
    print(outcomes.collect(), end="")


def _check_names(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(f"--{flag} must be of {', '.join(known)}, not {', '.join(unknown) or 'nothing'}.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
