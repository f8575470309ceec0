"""Does latent motion of videos make a policy better? The commands that answer it, and the table of what they found.

The data are ten demonstrations per task and five times as many videos without actions, on Tabletop half of them in
another look. The models that label the videos start from one encoder; LAQ and the policies are trained from scratch. A
policy is trained on one of several arms: `robot`, the demonstrations alone; `ceiling`, five times the demonstrations;
any other arm, the demonstrations and the videos, labelled by the model of that name. The diffusion and the
autoregressive policy learn from both at once, the vision-language-action model (`vla`) from videos first and then from
demonstrations.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from como_jax.errors import RunError
from como_jax.evaluation.tables import csv_text, markdown_table, wilson_interval
from como_jax.files import write_text
from como_jax.ownership import claim
from como_jax.processes import run_commands

logger = logging.getLogger(__name__)

CO_TRAINED = ("como", "discrete", "future_features")
LABELLERS = {"diffusion": CO_TRAINED, "autoregressive": CO_TRAINED, "vla": ("laq", "como")}
"""The models from whose labels each policy learns."""
TWO_STAGES = ("vla",)
"""Policies that learn from videos first and from demonstrations afterwards."""
DEMONSTRATIONS, FACTOR = 10, 5


@dataclasses.dataclass(frozen=True)
class Setting:
    """The tasks of one simulator, and the flags of its commands.

    Attributes:
      tasks: names of the tasks.
      looks: flags of the datasets of videos, by the name of their look; the first is that of the demonstrations.
      build: flags for all datasets.
      rollout: flags for all rollouts.
    """

    tasks: tuple[str, ...]
    looks: dict[str, tuple[str, ...]]
    build: tuple[str, ...]
    rollout: tuple[str, ...] = ()


SETTINGS = {
    "tabletop": Setting(
        tasks=("reach", "push", "pick_place", "open_drawer", "close_drawer", "press_button"),
        looks={"plain": (), "human": ("--look=human",)},
        build=("--noise=0.1",),
    ),
    "metaworld": Setting(
        tasks=("reach-v3", "push-v3", "drawer-open-v3", "button-press-v3", "pick-place-v3"),
        looks={"plain": ()},
        build=("--noise=0.1", "--action_repeat=4"),
        rollout=("--env_setting=action_repeat=4", "--max_steps=60"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that is finished once `product` exists."""

    name: str
    command: tuple[str, ...]
    product: Path


class Bench:
    """All jobs of one simulator, and the folders that they write to."""

    def __init__(self, env: str, out: Path, policies: Sequence[str], seeds: Sequence[int], episodes: int, steps: int):
        self.env, self.out, self.setting = env, out, SETTINGS[env]
        self.policies, self.seeds, self.episodes, self.steps = policies, seeds, episodes, steps
        self.runs = [(policy, arm, seed) for seed in seeds for policy in policies for arm in arms_of(policy)]
        self.labellers = list(dict.fromkeys(labeller for policy in policies for labeller in LABELLERS[policy]))

    def stages(self) -> list[list[Job]]:
        """Stages of jobs: a job needs those of earlier stages, but none of its own."""
        with_labels = [run for run in self.runs if run[1] in self.labellers]
        without = [run for run in self.runs if run[1] not in self.labellers]
        return [
            self._datasets(),
            # Policies without labels use the cores that the one encoder leaves idle.
            [self._pretrain("encoder", "ablation.py:encoder"), *(self._train(*run) for run in without)],
            [self._pretrain_labeller(name) for name in self.labellers],
            [self._evaluate(name) for name in self.labellers],
            [self._label(name, look) for name in self.labellers for look in self.setting.looks],
            [self._train_on_labels(*run) for run in with_labels if run[0] in TWO_STAGES],
            [self._train(*run) for run in with_labels],
            [self._roll_out(*run) for run in self.runs],
        ]

    def _datasets(self) -> list[Job]:
        demonstrations = DEMONSTRATIONS * len(self.setting.tasks)
        videos = FACTOR * demonstrations // len(self.setting.looks)
        # With the same first seed the ceiling holds the demonstrations of the robot, and more.
        jobs = [
            self._build("robot", demonstrations, 0, "--validation_fraction=0"),
            self._build("ceiling", FACTOR * demonstrations, 0, "--validation_fraction=0"),
            self._build("held_out", demonstrations, 1, "--validation_fraction=0.5"),
        ]
        for seed, (look, flags_of_look) in enumerate(self.setting.looks.items(), 2):
            jobs.append(self._build(f"videos_{look}", videos, seed, "--noactions", *flags_of_look))
        return jobs

    def _build(self, name: str, episodes: int, seed: int, *more: str) -> Job:
        tasks = f"--tasks={','.join(self.setting.tasks)}"
        shape = (f"--episodes={episodes}", f"--seed={seed}", "--image_size=64", tasks)
        product = self.out / name
        command = ("tools.datasets.build", self.env, f"--out={product}", *shape, *self.setting.build, *more)
        return Job(name, command, product / "dataset_info.json")

    @property
    def _videos(self) -> list[Path]:
        return [self.out / f"videos_{look}" for look in self.setting.looks]

    def _pretrain_labeller(self, name: str) -> Job:
        if name == "laq":
            return self._pretrain(name, "pretrain_laq.py:tiny", "--config.train.evaluate_every=0")
        return self._pretrain(name, f"ablation.py:{name}", f"--config.encoder.init_from={self.out / 'encoder'}")

    def _pretrain(self, name: str, recipe: str, *more: str) -> Job:
        mixture = ",".join(map(str, [self.out / "robot", *self._videos]))
        command = ("experiments.pretrain", f"--config=configs/{recipe}", f"--data={mixture}", *more)
        return self._run(name, command, self.out / name)

    def _run(self, name: str, command: tuple[str, ...], workdir: Path) -> Job:
        # A stopped run has checkpoints too, so `run_stage` writes this file when the command has succeeded.
        return Job(name, (*command, f"--workdir={workdir}"), workdir / "finished")

    def _evaluate(self, labeller: str) -> Job:
        out = self.out / f"{labeller}_report"
        command = ("experiments.evaluate", f"--workdir={self.out / labeller}", f"--data={self.out / 'held_out'}")
        return Job(out.name, (*command, f"--out={out}"), out / "metrics.json")

    def _label(self, labeller: str, look: str) -> Job:
        out = self.out / f"labels_{labeller}_{look}"
        command = ("experiments.extract_labels", f"--workdir={self.out / labeller}")
        return Job(out.name, (*command, f"--data={self.out / f'videos_{look}'}", f"--out={out}"), out / "labels.json")

    def _train_on_labels(self, policy: str, arm: str, seed: int) -> Job:
        workdir = self._workdir(policy, arm, seed).with_name(f"{policy}_{arm}_{seed}_latent")
        return self._train_policy(f"{policy}.py:latent,tiny", self._labels(arm), seed, workdir)

    def _train(self, policy: str, arm: str, seed: int) -> Job:
        workdir, more = self._workdir(policy, arm, seed), []
        data = [str(self.out / ("ceiling" if arm == "ceiling" else "robot"))]
        is_labelled, has_stages = arm in self.labellers, policy in TWO_STAGES
        if is_labelled and has_stages:
            more = [f"--config.init_from={workdir.with_name(f'{workdir.name}_latent')}"]
        elif is_labelled:
            # Half of the samples are of the robot, whatever the number of datasets of videos.
            labels = self._labels(arm)
            data = [f"{data[0]}={len(labels)}", *labels]
        recipe = f"{policy}.py:finetune,tiny" if has_stages else f"{policy}.py:tiny"
        return self._train_policy(recipe, data, seed, workdir, *more)

    def _train_policy(self, recipe: str, data: Sequence[str], seed: int, workdir: Path, *more: str) -> Job:
        changes = {
            "seed": seed,
            "train.num_steps": self.steps,
            "train.evaluate_every": 0,
            "train.checkpoint_every": 0,
        }
        overrides = [f"--config.{name}={value}" for name, value in changes.items()]
        command = ("experiments.train_policy", f"--config=configs/policy_{recipe}", f"--data={','.join(data)}")
        return self._run(workdir.name, (*command, *overrides, *more), workdir)

    def _labels(self, labeller: str) -> list[str]:
        return [str(self.out / f"labels_{labeller}_{look}") for look in self.setting.looks]

    def _roll_out(self, policy: str, arm: str, seed: int) -> Job:
        workdir = self._workdir(policy, arm, seed)
        out = self.out / "rollouts" / workdir.name
        numbers = (f"--episodes={self.episodes}", "--execute=4", "--workers=1", "--videos=0")
        tasks = f"--env={self.env}:{','.join(self.setting.tasks)}"
        command = ("experiments.rollout", f"--workdir={workdir}", f"--out={out}", tasks, *numbers)
        return Job(f"rollout_{workdir.name}", (*command, *self.setting.rollout), out / "summary.json")

    def _workdir(self, policy: str, arm: str, seed: int) -> Path:
        return self.out / "policies" / f"{policy}_{arm}_{seed}"


def arms_of(policy: str) -> tuple[str, ...]:
    """The arms of a policy: what it is trained on."""
    return ("robot", *LABELLERS[policy], "ceiling")


def run_stage(jobs: Sequence[Job], logs: Path, processes: int) -> None:
    """Runs the jobs that are not finished yet, `processes` at once.

    Raises:
      RunError: a command failed; the message names its log.
    """
    waiting = [job for job in jobs if not job.product.exists()]
    commands = [[sys.executable, "-m", *job.command] for job in waiting]
    files = [logs / f"{job.name}.log" for job in waiting]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(logs / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        **os.environ,
    }
    for number, status in run_commands(commands, files, processes, environment):
        job = waiting[number]
        if status:
            raise RunError(f"{job.name} failed with exit status {status}; see {files[number]}.")
        if job.product.name == "finished":
            write_text(job.product, "")
        if not job.product.exists():
            raise RunError(f"{job.name} ended without {job.product}; see {files[number]}.")
        logger.info("%s is done", job.name)


def write_tables(bench: Bench) -> str:
    """Writes table.csv, with every run, and table.md from what the rollouts found; returns the latter."""
    claim(epath.Path(bench.out), ("table.csv", "table.md"))
    rows: list[dict[str, Any]] = []
    for policy, arm, seed in bench.runs:
        path = bench.out / "rollouts" / f"{policy}_{arm}_{seed}" / "summary.json"
        if path.exists():
            for task, rate in json.loads(path.read_text())["tasks"].items():
                rows.append({"policy": policy, "arm": arm, "seed": seed, "task": task, **rate})
    columns = ["policy", "arm", "seed", "task", "episodes", "crashed", "successes", "mean_steps"]
    write_text(bench.out / "table.csv", csv_text([columns, *([row[name] for name in columns] for row in rows)]))
    titles = ["policy", "videos labelled by", "seeds", "success", "95 %", "by seed", *bench.setting.tasks]
    lines = [_line(bench, policy, arm, rows) for policy in bench.policies for arm in arms_of(policy)]
    table = markdown_table([[*titles, "LP-MSE", "S-PCFC"], *lines])
    write_text(bench.out / "table.md", table)
    return table


def _line(bench: Bench, policy: str, arm: str, rows: list[dict[str, Any]]) -> list[str]:
    mine = [row for row in rows if row["policy"] == policy and row["arm"] == arm]
    by_seed = [_rate([row for row in mine if row["seed"] == seed]) for seed in bench.seeds]
    found = [rate for rate in by_seed if not math.isnan(rate)]
    names = [f"{bench.env}:{task}" for task in bench.setting.tasks]
    tasks = [_percent(_rate([row for row in mine if row["task"] == name])) for name in names]
    title = {"robot": "none", "ceiling": f"none, {FACTOR} times the demonstrations"}.get(arm, arm)
    spread = f" ± {100 * statistics.stdev(found):.1f}" if len(found) > 1 else ""
    cells = [policy, title, f"{len(found)} of {len(by_seed)}", _percent(_rate(mine)) + spread, _interval(mine)]
    return [*cells, ", ".join(map(_percent, found)), *tasks, *_labeller_metrics(bench, arm)]


def _labeller_metrics(bench: Bench, arm: str) -> list[str]:
    path = bench.out / f"{arm}_report" / "metrics.json"
    if not path.exists():
        return ["", ""]
    metrics = json.loads(path.read_text())
    return [f"{metrics['lp_mse']:.4f}", f"{metrics['s_pcfc']:.2f}"]


def _counts(rows: list[dict[str, Any]]) -> tuple[int, int]:
    return sum(row["successes"] for row in rows), sum(row["episodes"] - row["crashed"] for row in rows)


def _rate(rows: list[dict[str, Any]]) -> float:
    successes, finished = _counts(rows)
    return successes / finished if finished else math.nan


def _interval(rows: list[dict[str, Any]]) -> str:
    successes, finished = _counts(rows)
    if not finished:
        return ""
    low, high = wilson_interval(successes, finished)
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _percent(rate: float) -> str:
    return "" if math.isnan(rate) else f"{100 * rate:.1f}"
