"""Runs a recipe many times, over any fields of its config and several seeds, and tabulates what came out.

    python -m experiments.sweep --config configs/pretrain_como.py:tiny --data DIR --out SWEEP \\
      --latent_dims 16,32,64 --seeds 0,1,2
    python -m experiments.sweep --config configs/pretrain_como.py:tiny --data DIR --out SWEEP \\
      --sweep model.tcl_weight=0.0,0.004 --sweep model.motion_input=future,difference --set train.num_steps=300
    python -m experiments.sweep --config configs/ablation.py --variants all --data DIR --out SWEEP --seeds 0,1,2

SWEEP gets one run for every combination, cells.csv, table.csv, table.md and, with --latent_dims, figure.png and
figure.svg, all updated after every run. Run the same command again to resume: finished runs stay as they are. With
--processes N, N runs go on at once, each a process of its own with an equal share of the CPU cores; on one GPU they
share its memory. The exit status is 1 if a run failed.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Iterator, Sequence

import jax
from absl import flags
from etils import epath

from como_jax import cli
from como_jax.data.mixture import mixture_text
from como_jax.errors import ConfigError, NonFiniteError, RunError, UsageError
from como_jax.evaluation.sweeps.cells import Cell, expand_recipes, make_cells, parse_swept, run_in_processes
from como_jax.evaluation.sweeps.report import LATENT_DIM, CellResult, Status, tabulate, unfinished
from como_jax.training.run import NOTHING_ELSE, Allowed, allowed_by_flags
from experiments.pretrain import DATA, pretrain

# experiments.pretrain has a --config of its own, for one recipe.
CONFIG = flags.DEFINE_multi_string("config", None, "Recipe, PATH or PATH:VARIANT; repeatable.", allow_override=True)
VARIANTS = flags.DEFINE_list("variants", [], "Variants of every --config without one; all: those the file lists.")
LATENT_DIMS = flags.DEFINE_list("latent_dims", [], f"Short for --sweep {LATENT_DIM}=...")
SWEEP = flags.DEFINE_multi_string("sweep", [], "FIELD=VALUE,VALUE of the config; may be repeated.")
SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE for all runs that have the field; may be repeated.")
SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of every setting.")
OUT = flags.DEFINE_string("out", None, "Directory of the sweep.")
PROCESSES = flags.DEFINE_integer("processes", 1, "Runs at once; 1 runs all in this process.", lower_bound=1)
TABLE_ONLY = flags.DEFINE_bool("table_only", False, "Run nothing, only tabulate what is there.")

logger = logging.getLogger("como_jax.sweep")


def sweep(
    cells: Sequence[Cell], out: epath.PathLike, processes: int = 1, allowed: Allowed = NOTHING_ELSE
) -> list[CellResult]:
    """Runs or resumes all cells that are not finished, however many fail; returns the results of all, in their order.

    Args:
      cells: of `make_cells`.
      out: gets the tables.
      processes: how many cells run at once.
      allowed: what may differ from what the runs began with.

    Raises:
      OutputError: `out` cannot be written, or holds tables that are not of a sweep.
    """
    results = tabulate(cells, out)
    waiting = unfinished(results)
    logger.info("Sweep: %d runs in %s, %d of them finished", len(cells), out, len(cells) - len(waiting))
    cache_programs(epath.Path(out) / ".xla_cache")
    failures: dict[epath.Path, str] = {}
    start = time.monotonic()
    outcomes = (
        run_here(waiting, allowed)
        if processes == 1
        else run_in_processes(
            "experiments.pretrain",
            waiting,
            processes,
            [f"--{name}" for name, is_allowed in vars(allowed).items() if is_allowed],
        )
    )
    with contextlib.closing(outcomes):
        for done, (cell, failure) in enumerate(outcomes, 1):
            if failure:
                failures[cell.workdir] = failure
                logger.error("Failed: %s: %s", cell.workdir, failure)
            results = tabulate(cells, out, failures)
            left = (time.monotonic() - start) / done * (len(waiting) - done)
            logger.info("Run %d of %d done, about %.0f min left", done, len(waiting), left / 60)
    return results


def run_here(cells: Sequence[Cell], allowed: Allowed = NOTHING_ELSE) -> Iterator[tuple[Cell, str]]:
    """Runs cells one after another in this process; yields each with the reason why it failed, or ""."""
    for cell in cells:
        logger.info("Next: %s", cell.workdir)
        try:
            state = pretrain(cell.config, cell.workdir, allowed)
        except (NonFiniteError, UsageError) as error:
            yield cell, str(error)
        except Exception as error:  # Out of memory, for example: a sweep overnight goes on with its other cells.
            logger.exception("%s", cell.workdir)
            yield cell, " ".join(f"{type(error).__name__}: {error}".split())
        else:
            train = cell.config.train
            if int(state.step) < min(train.num_steps, train.stop_after or train.num_steps):
                raise KeyboardInterrupt  # Training ends early on SIGTERM alone, and does not pass it on.
            yield cell, ""


def cache_programs(directory: epath.Path) -> None:
    """Shares compiled programs among the cells, unless JAX already has a folder for them."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def main(arguments: Sequence[str]) -> None:
    """Reads the flags."""
    cli.no_arguments(arguments)
    swept = parse_swept([*([f"{LATENT_DIM}={','.join(LATENT_DIMS.value)}"] if LATENT_DIMS.value else []), *SWEEP.value])
    if not all(seed.isdecimal() for seed in SEEDS.value):
        raise ConfigError(f"--seeds {','.join(SEEDS.value)} are not whole numbers separated by commas.")
    fixed = [*SET.value, *([f"data.mixture={mixture_text(DATA.value)}"] if DATA.value is not None else [])]
    cells = make_cells(
        OUT.value, expand_recipes(CONFIG.value, VARIANTS.value), swept, fixed, [int(seed) for seed in SEEDS.value]
    )
    if TABLE_ONLY.value:
        if not epath.Path(OUT.value).exists():
            raise RunError(f"--out {OUT.value} does not exist, so there is nothing to tabulate.")
        results = tabulate(cells, OUT.value)
    else:
        # SIGTERM, outside of a training loop, ends the sweep as Ctrl-C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            results = sweep(cells, OUT.value, PROCESSES.value, allowed_by_flags())
        except KeyboardInterrupt:
            logger.info("Stopped; run the same command to go on.")
            sys.exit(130)
    failed = [result for result in results if result.status is Status.FAILED]
    for result in failed:
        logger.error("Failed: %s: %s", result.cell.workdir, result.reason)
    logger.info("Table: %s", epath.Path(OUT.value) / "table.md")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "out"])
    flags.register_validator("workdir", lambda workdir: workdir is None, message="The directory of a sweep is --out.")
    cli.run(main)
