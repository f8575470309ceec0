"""Does latent motion of videos make a policy better? The commands that answer it; `bench_results` has the table.

The data are ten demonstrations per task and five times as many videos without actions, half of them in other looks
where the simulator has any. The models that label the videos start from one encoder; LAQ and the policies are trained
from scratch. A policy is trained on one of several arms:

- `none`, the demonstrations alone;
- the name of a labeller: the demonstrations, and on top of them as many samples of the videos that it has labelled;
- `none_twice`, the demonstrations alone, with as many samples as the arms with videos have in all;
- `ceiling`, five times the demonstrations, with as many samples as `none`.

The diffusion and the autoregressive policy learn from demonstrations and videos at once, the vision-language-action
model (`vla`) from videos first and then from demonstrations.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from como_jax.errors import RunError
from como_jax.evaluation.sweeps.bench_results import Run
from como_jax.files import write_text
from como_jax.processes import run_commands

logger = logging.getLogger(__name__)

RECIPES = {
    "como": "ablation.py:como",
    "vq": "ablation.py:discrete",
    "future_features": "ablation.py:future_features",
    "laq": "pretrain_laq.py:tiny",
}
"""The recipes of the models that label videos."""
_CO_TRAINED = ("como", "vq", "future_features")
LABELLERS = {"diffusion": _CO_TRAINED, "autoregressive": _CO_TRAINED, "vla": ("laq", "como")}
"""The models from whose labels each policy learns."""
ARMS = ("none", "none_twice", *RECIPES, "ceiling")
TWO_STAGES = ("vla",)
"""Policies that learn from videos first and from demonstrations afterwards."""
FACTOR = 5
"""Videos, and demonstrations of the ceiling, for each demonstration of the robot."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The tasks of one simulator, and the flags of its commands.

    Attributes:
      builder: of `tools.datasets.build`.
      environment: of the rollouts, as in `tabletop:reach,push`.
      tasks: their number.
      looks: flags of the datasets of videos, by the name of their look; the first is that of the demonstrations.
      build: flags for all datasets.
      build_robot: flags for those with actions.
      episodes_flag: the flag that says how many episodes to record.
      is_per_task: whether it counts those of each task, and not all.
      demonstrations: of each task.
      held_out: episodes of each task that labellers are measured on.
      labeller: further fields of the configs of encoder and labellers.
      rollout: flags for all rollouts.
      variant: of the policies' recipes.
      policy: further fields of their configs.
      batch_size: samples of demonstrations in a batch.
      steps: updates of every policy.
    """

    builder: str
    environment: str
    tasks: int
    looks: dict[str, tuple[str, ...]]
    build: tuple[str, ...]
    build_robot: tuple[str, ...] = ()
    episodes_flag: str = "episodes"
    is_per_task: bool = False
    demonstrations: int = 10
    held_out: int = 10
    labeller: tuple[str, ...] = ()
    rollout: tuple[str, ...] = ()
    variant: str = "tiny"
    policy: tuple[str, ...] = ()
    batch_size: int = 32
    steps: int = 1500

    @property
    def suite(self) -> str:
        """As in the first column of the table of episodes."""
        family, _, name = self.environment.partition(":")
        return name if family == "libero" else family


def _libero(suite: str) -> Setting:
    return Setting(
        builder="libero_sim",
        environment=f"libero:{suite}",
        tasks=10,
        looks={"plain": (), "other": ("--variation=camera,motion,colours,textures,light,arm",)},
        build=(f"--suite={suite}", "--noise=0.05"),
        build_robot=("--camera=agentview_rgb,eye_in_hand_rgb",),
        episodes_flag="episodes_per_task",
        is_per_task=True,
        held_out=4,
        variant="small",
        policy=('--config.data.cameras=("agentview_rgb","eye_in_hand_rgb")',),
        batch_size=128,
        steps=3500,
    )


_TABLETOP = "reach,push,pick_place,open_drawer,close_drawer,press_button"
_METAWORLD = "reach-v3,push-v3,drawer-open-v3,button-press-v3,pick-place-v3"
SETTINGS = {
    **{suite: _libero(suite) for suite in ("libero_spatial", "libero_object", "libero_goal")},
    "tabletop": Setting(
        builder="tabletop",
        environment=f"tabletop:{_TABLETOP}",
        tasks=6,
        looks={"plain": (), "human": ("--look=human",)},
        build=(f"--tasks={_TABLETOP}", "--noise=0.1", "--image_size=64", "--scene=fixed"),
        variant="small",
        batch_size=128,
        steps=2500,
    ),
    "metaworld": Setting(
        builder="metaworld",
        environment=f"metaworld:{_METAWORLD}",
        tasks=5,
        looks={"plain": ()},
        build=(f"--tasks={_METAWORLD}", "--noise=0.1", "--action_repeat=4", "--image_size=64"),
        rollout=("--env_setting=action_repeat=4", "--max_steps=60"),
    ),
    # A check that everything runs; its policies learn nothing.
    "smoke": Setting(
        builder="tabletop",
        environment="tabletop:reach,push",
        tasks=2,
        looks={"plain": (), "human": ("--look=human",)},
        build=("--tasks=reach,push", "--image_size=64", "--scene=fixed"),
        demonstrations=2,
        held_out=6,
        labeller=("--config.train.num_steps=4", "--config.data.batch_size=8"),
        rollout=("--max_steps=6",),
        variant="smoke",
        batch_size=8,
        steps=4,
    ),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that is finished once `product` exists."""

    name: str
    command: tuple[str, ...]
    product: Path


@dataclasses.dataclass(frozen=True)
class Bench:
    """All jobs of one simulator, and the folders that they write to.

    Attributes:
      env: a key of `SETTINGS`.
      out: gets everything.
      policies, arms, seeds: that are compared; arms that a policy does not have are left out.
      episodes: rollouts of every task.
      steps: updates of every policy; 0 for the setting's number.
    """

    env: str
    out: Path
    policies: Sequence[str]
    arms: Sequence[str]
    seeds: Sequence[int]
    episodes: int
    steps: int = 0

    @property
    def setting(self) -> Setting:
        """Tasks and flags of the simulator."""
        return SETTINGS[self.env]

    @property
    def runs(self) -> list[Run]:
        """The policies that are trained, those of a seed together."""
        return [
            Run(policy, arm, seed)
            for seed in self.seeds
            for policy in self.policies
            for arm in ARMS
            if arm in self.arms and arm in arms_of(policy)
        ]

    def stages(self, done: Sequence[Run] = ()) -> list[list[Job]]:
        """Stages of jobs: a job needs those of earlier stages, but none of its own.

        Args:
          done: runs whose episodes are known already.
        """
        runs = [run for run in self.runs if run not in done]
        labellers = list(dict.fromkeys(run.arm for run in runs if run.arm in RECIPES))
        stages = [
            self._datasets(runs),
            [self._pretrain("encoder", "ablation.py:encoder")] if set(labellers) - {"laq"} else [],
            [self._pretrain_labeller(name) for name in labellers],
            [self._evaluate(name) for name in labellers],
            [self._label(name, look) for name in labellers for look in self.setting.looks],
        ]
        for seed in self.seeds:
            of_seed = [run for run in runs if run.seed == seed]
            stages += [
                [self._train_on_labels(run) for run in of_seed if run.arm in RECIPES and run.policy in TWO_STAGES],
                [self._train(run) for run in of_seed],
                [self._roll_out(run) for run in of_seed],
            ]
        return [stage for stage in stages if stage]

    def rollout_folder(self, run: Run) -> Path:
        """What the rollouts of a run write to."""
        return self.out / "rollouts" / run.name

    def report_folder(self, labeller: str) -> Path:
        """What the evaluation of a labeller writes to."""
        return self.out / f"{labeller}_report"

    def _datasets(self, runs: Sequence[Run]) -> list[Job]:
        arms = {run.arm for run in runs}
        jobs, robot = [], self.setting.demonstrations
        # With the same first seed the ceiling holds the demonstrations of the robot, and more.
        if arms - {"ceiling"}:
            jobs.append(self._build("robot", robot, 0, "--validation_fraction=0"))
        if "ceiling" in arms:
            jobs.append(self._build("ceiling", FACTOR * robot, 0, "--validation_fraction=0"))
        if arms & set(RECIPES):
            jobs.append(self._build("held_out", self.setting.held_out, 1, "--validation_fraction=0.5"))
            looks = self.setting.looks
            videos = FACTOR * robot // len(looks)
            for seed, (look, flags_of_look) in enumerate(looks.items(), 2):
                jobs.append(self._build(f"videos_{look}", videos, seed, "--noactions", *flags_of_look))
        return jobs

    def _build(self, name: str, per_task: int, seed: int, *more: str) -> Job:
        setting, product = self.setting, self.out / name
        episodes = per_task if setting.is_per_task else per_task * setting.tasks
        count = (f"--{setting.episodes_flag}={episodes}", f"--seed={seed}")
        robot = () if "--noactions" in more else setting.build_robot
        command = ("tools.datasets.build", setting.builder, f"--out={product}", *count, *setting.build, *robot, *more)
        return Job(name, command, product / "dataset_info.json")

    @property
    def _videos(self) -> list[Path]:
        return [self.out / f"videos_{look}" for look in self.setting.looks]

    def _pretrain_labeller(self, name: str) -> Job:
        if name == "laq":
            return self._pretrain(name, RECIPES[name], "--config.train.evaluate_every=0")
        return self._pretrain(name, RECIPES[name], f"--config.encoder.init_from={self.out / 'encoder'}")

    def _pretrain(self, name: str, recipe: str, *more: str) -> Job:
        mixture = ",".join(map(str, [self.out / "robot", *self._videos]))
        command = ("experiments.pretrain", f"--config=configs/{recipe}", f"--data={mixture}")
        return self._run(name, (*command, *self.setting.labeller, *more), self.out / name)

    def _run(self, name: str, command: tuple[str, ...], workdir: Path) -> Job:
        # A stopped run has checkpoints too, so `run_stage` writes this file when the command has succeeded.
        return Job(name, (*command, f"--workdir={workdir}"), workdir / "finished")

    def _evaluate(self, labeller: str) -> Job:
        out = self.report_folder(labeller)
        command = ("experiments.evaluate", f"--workdir={self.out / labeller}", f"--data={self.out / 'held_out'}")
        return Job(out.name, (*command, f"--out={out}"), out / "metrics.json")

    def _label(self, labeller: str, look: str) -> Job:
        out = self.out / f"labels_{labeller}_{look}"
        command = ("experiments.extract_labels", f"--workdir={self.out / labeller}")
        return Job(out.name, (*command, f"--data={self.out / f'videos_{look}'}", f"--out={out}"), out / "labels.json")

    def _train_on_labels(self, run: Run) -> Job:
        workdir = self._workdir(run).with_name(f"{run.name}_latent")
        return self._train_policy(run, f"latent,{self.setting.variant}", self._labels(run.arm), workdir)

    def _train(self, run: Run) -> Job:
        workdir, more = self._workdir(run), []
        data, factor = [str(self.out / ("ceiling" if run.arm == "ceiling" else "robot"))], 1
        has_stages = run.policy in TWO_STAGES
        if run.arm == "none_twice":
            factor = 2
        elif run.arm in RECIPES and has_stages:
            more = [f"--config.init_from={workdir.with_name(f'{run.name}_latent')}"]
        elif run.arm in RECIPES:
            # Half of the samples are of the robot, whatever the number of datasets of videos; and as many as without.
            labels = self._labels(run.arm)
            data, factor = [f"{data[0]}={len(labels)}", *labels], 2
        variant = f"finetune,{self.setting.variant}" if has_stages else self.setting.variant
        return self._train_policy(run, variant, data, workdir, *more, factor=factor)

    def _train_policy(
        self, run: Run, variant: str, data: Sequence[str], workdir: Path, *more: str, factor: int = 1
    ) -> Job:
        setting = self.setting
        changes = {
            "seed": run.seed,
            "data.batch_size": factor * setting.batch_size,
            "train.num_steps": self.steps or setting.steps,
            "train.evaluate_every": 0,
        }
        overrides = [f"--config.{name}={value}" for name, value in changes.items()]
        recipe = f"--config=configs/policy_{run.policy}.py:{variant}"
        command = ("experiments.train_policy", recipe, f"--data={','.join(data)}")
        return self._run(workdir.name, (*command, *overrides, *setting.policy, *more), workdir)

    def _labels(self, labeller: str) -> list[str]:
        return [str(self.out / f"labels_{labeller}_{look}") for look in self.setting.looks]

    def _roll_out(self, run: Run) -> Job:
        out = self.rollout_folder(run)
        numbers = (f"--episodes={self.episodes}", "--execute=4", "--workers=1", "--videos=0")
        command = ("experiments.rollout", f"--workdir={self._workdir(run)}", f"--out={out}", *numbers)
        env = f"--env={self.setting.environment}"
        return Job(f"rollout_{run.name}", (*command, env, *self.setting.rollout), out / "summary.json")

    def _workdir(self, run: Run) -> Path:
        return self.out / "policies" / run.name


def arms_of(policy: str) -> tuple[str, ...]:
    """The arms that a policy can be trained on."""
    twice = () if policy in TWO_STAGES else ("none_twice",)
    return ("none", *twice, *LABELLERS[policy], "ceiling")


def run_stage(jobs: Sequence[Job], logs: Path, processes: int, after: Callable[[], None] = lambda: None) -> None:
    """Runs the jobs that are not finished yet, `processes` at once.

    Args:
      jobs: of one stage.
      logs: a folder, which gets what each command prints.
      processes: commands at once.
      after: is called whenever a job has ended well.

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
        after()
