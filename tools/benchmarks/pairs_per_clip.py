"""Do more pairs of every encoded clip buy speed with worse learning? LP-MSE after equal FLOPs.

    python -m tools.benchmarks.pairs_per_clip --data datasets/tabletop --out runs/pairs_per_clip

CoMo of the ablation's size, with clips of 2, 4 and 8 instants and all pairs of each whose gap lies in the same range.
Every step has as many clips as cost the same FLOPs at the size of the paper, by formula, where the encoder has the
greater part of the work; in the small model it has the smaller one, and nothing would be gained. Runs that are finished
stay as they are; OUT/table.md gets the table.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from como_jax import cli
from como_jax.errors import RunError
from como_jax.files import write_text
from como_jax.motion.build import pairs_of_clip
from como_jax.processes import run_commands
from como_jax.training.flops import train_flops
from configs import ablation, pretrain_como
from tools.benchmarks.machine import describe_machine

logger = logging.getLogger("como_jax.pairs_per_clip")

# Instants of a clip, and how many of them the full gap spans: with six control steps a gap, pairs of three to six.
CLIPS = ((2, 1), (4, 3), (8, 6))
GAP_SECONDS, MIN_GAP_FRACTION = 0.6, 0.5


def with_clips(config: ConfigDict, instants: int, pair_span: int) -> ConfigDict:
    """The config with other clips, and as many of them as cost what `batch_size` clips of two instants do."""
    config = config.copy_and_resolve_references()
    config.data.update(_data(instants, pair_span))
    config.data.batch_size = round(config.data.batch_size * _cost(*CLIPS[0]) / _cost(instants, pair_span))
    return config


def _data(instants: int, pair_span: int) -> dict[str, float]:
    gaps = {"gap_seconds": GAP_SECONDS, "min_gap_fraction": MIN_GAP_FRACTION}
    return {"instants": instants, "pair_span": pair_span, **gaps}


def _cost(instants: int, pair_span: int) -> float:
    """FLOPs of one clip at the size of the paper."""
    config = pretrain_como.get_config()
    config.data.update(_data(instants, pair_span))
    return sum(train_flops(config).values())


class Study:
    """All runs and where they are."""

    def __init__(self, data: str, out: Path, steps: int, seeds: Sequence[int]):
        self.data, self.out, self.steps, self.seeds = data, out, steps, seeds
        self.configs = {clip: with_clips(ablation.get_config("como"), *clip) for clip in CLIPS}
        self.runs = [(clip, seed) for seed in seeds for clip in CLIPS]

    def workdir(self, clip: tuple[int, int], seed: int) -> Path:
        """Of a run."""
        return self.out / f"{clip[0]}_instants_{seed}"

    def encoder(self) -> list[str]:
        """The command that trains the encoder of all runs."""
        return self._pretrain("encoder", self.out / "encoder", {})

    def train(self, clip: tuple[int, int], seed: int) -> list[str]:
        """The command of a run."""
        data = self.configs[clip].data
        names = ("gap_seconds", "min_gap_fraction", "instants", "pair_span", "batch_size")
        changes = {f"data.{name}": data[name] for name in names} | {"seed": seed, "train.num_steps": self.steps}
        return self._pretrain("como", self.workdir(clip, seed), changes | {"encoder.init_from": self.out / "encoder"})

    def evaluate(self, clip: tuple[int, int], seed: int) -> list[str]:
        """The command that judges a run."""
        workdir = self.workdir(clip, seed)
        command = ["experiments.evaluate", f"--workdir={workdir}", f"--data={self.data}", f"--out={workdir / 'report'}"]
        return [sys.executable, "-m", *command]

    def table(self) -> str:
        """A line for every kind of clip."""
        lines = ["| instants | pairs | clips a step | pairs a step | LP-MSE | by seed |", "|---|---|---|---|---|---|"]
        for clip, config in self.configs.items():
            reports = [self.workdir(clip, seed) / "report" / "metrics.json" for seed in self.seeds]
            found = [json.loads(report.read_text())["lp_mse"] for report in reports]
            pairs, clips = pairs_of_clip(config), config.data.batch_size
            by_seed = ", ".join(f"{value:.4f}" for value in found)
            row = (clip[0], pairs, clips, pairs * clips, f"{statistics.mean(found):.4f}", by_seed)
            lines.append(f"| {' | '.join(map(str, row))} |")
        return "\n".join(lines) + "\n"

    def _pretrain(self, row: str, workdir: Path, changes: dict[str, object]) -> list[str]:
        overrides = [f"--config.{name}={value}" for name, value in changes.items()]
        command = ["experiments.pretrain", f"--config=configs/ablation.py:{row}", f"--workdir={workdir}"]
        return [sys.executable, "-m", *command, f"--data={self.data}", *overrides]


def run_all(commands: dict[str, list[str]], logs: Path, processes: int) -> None:
    """Runs commands by name, several at once, but for those that ended well before.

    Raises:
      RunError: one failed; the message names its log.
    """
    waiting = {name: command for name, command in commands.items() if not (logs / f"{name}.done").exists()}
    names, files = list(waiting), [logs / f"{name}.log" for name in waiting]
    for number, status in run_commands(list(waiting.values()), files, processes, os.environ):
        if status:
            raise RunError(f"{names[number]} failed with exit status {status}; see {files[number]}.")
        write_text(logs / f"{names[number]}.done", "")
        logger.info("%s is done", names[number])


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("data", None, "Dataset with actions at 10 Hz, such as one of tabletop.", required=True)
    flags.DEFINE_string("out", None, "Directory of everything.", required=True)
    flags.DEFINE_integer("steps", 800, "Updates of every run.", lower_bound=1)
    flags.DEFINE_list("seeds", ["0", "1"], "Seeds of the runs.")
    flags.DEFINE_integer("processes", 2, "Runs at once, each on an equal share of the cores.", lower_bound=1)


def main(arguments: Sequence[str]) -> None:
    """Runs all and prints the table."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    out = Path(given.out).resolve()
    study = Study(str(Path(given.data).resolve()), out, given.steps, [int(seed) for seed in given.seeds])
    run_all({"encoder": study.encoder()}, out / "logs", given.processes)
    run_all({study.workdir(*run).name: study.train(*run) for run in study.runs}, out / "logs", given.processes)
    reports = {f"{study.workdir(*run).name}_report": study.evaluate(*run) for run in study.runs}
    run_all(reports, out / "logs", given.processes)
    table = study.table()
    write_text(out / "table.md", table)
    print(describe_machine(), f"{given.steps} steps", table, sep="\n", end="")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
