"""Does latent motion of videos make a policy better? Demonstrations, videos, labellers, policies, success: one command.

    python -m tools.policy_bench --env tabletop --out runs/policy_bench
    python -m tools.policy_bench --env metaworld --out runs/policy_bench_metaworld --policies diffusion --seeds 0

Builds the datasets, trains the models that label videos and the policies that learn from them, rolls the policies out,
and writes OUT/table.md, and table.csv with every run; `como_jax.evaluation.sweeps.policy_bench` has the details. What
is finished stays as it is, so that the same command resumes after a stop.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from como_jax import cli
from como_jax.errors import ConfigError, RunError
from como_jax.evaluation.sweeps.policy_bench import LABELLERS, SETTINGS, Bench, run_stage, write_tables

logger = logging.getLogger("como_jax.policy_bench")


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_enum("env", "tabletop", tuple(SETTINGS), "Simulator.")
    flags.DEFINE_string("out", None, "Directory of everything.", required=True)
    flags.DEFINE_list("policies", ["diffusion", "autoregressive"], f"Of {', '.join(LABELLERS)}.")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the policies; data and labellers are the same for all.")
    flags.DEFINE_integer("episodes", 20, "Rollouts of every task, policy and seed.", lower_bound=1)
    flags.DEFINE_integer("steps", 800, "Updates of every policy.", lower_bound=1)
    flags.DEFINE_integer("processes", 2, "Commands at once, each on an equal share of the cores.", lower_bound=1)
    flags.DEFINE_bool("table_only", False, "Run nothing, only tabulate what is there.")


def main(arguments: Sequence[str]) -> None:
    """Reads the flags and runs the bench."""
    cli.no_arguments(arguments)
    values = flags.FLAGS
    unknown = set(values.policies) - set(LABELLERS)
    if unknown or not all(seed.isdecimal() for seed in values.seeds):
        raise ConfigError(f"--policies are of {', '.join(LABELLERS)}, and --seeds whole numbers.")
    seeds = [int(seed) for seed in values.seeds]
    bench = Bench(values.env, Path(values.out).resolve(), values.policies, seeds, values.episodes, values.steps)
    if values.table_only and not bench.out.exists():
        raise RunError(f"--out {values.out} does not exist, so there is nothing to tabulate.")
    # SIGTERM ends the running commands as Ctrl-C does; they save their state in both cases.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if not values.table_only:
        try:
            for jobs in bench.stages():
                run_stage(jobs, bench.out / "logs", values.processes)
        except KeyboardInterrupt:
            logger.info("Stopped; run the same command to go on.")
            sys.exit(130)
    print(write_tables(bench), end="")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
