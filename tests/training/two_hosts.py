"""A job of two processes with four devices each, and what the tests have it do.

python -m tests.training.two_hosts --task=TASK --out=DIR --data=DATASET --coordinator=... (started by `Job`)
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from absl import flags
from flax import traverse_util
from ml_collections import ConfigDict

from como_jax import cli, hosts
from como_jax.data.motion_data import open_motion_data, to_frame_pairs
from como_jax.data.pipeline import training_batches
from como_jax.motion.models import batch_parts, build_model
from como_jax.training import sharding, trainer
from como_jax.training.train_state import TrainState, abstract_state
from como_jax.training.train_step import make_train_step
from como_jax.types import FramePairs
from experiments.pretrain import pretrain
from experiments.train_policy import train_policy

REPOSITORY = Path(__file__).resolve().parents[2]
# Data, fsdp and tensor: both hosts are in one group of tensor parallelism. Runs cover the other axes.
TENSOR_ACROSS = (1, 1, 8)
NUM_STEPS = 14


class Job(NamedTuple):
    """Both processes."""

    processes: list[subprocess.Popen[str]]

    @classmethod
    def start(cls, tasks: str, out: Path, data: Path) -> Job:
        """Starts TASK,TASK on both."""
        with socket.socket() as listener:
            listener.bind(("localhost", 0))
            port = listener.getsockname()[1]
        # The rest is that of the tests.
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
        command = [
            sys.executable,
            "-m",
            "tests.training.two_hosts",
            f"--task={tasks}",
            f"--out={out}",
            f"--data={data}",
        ]
        command += [f"--coordinator=localhost:{port}", "--num_processes=2"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return cls(
            [
                subprocess.Popen([*command, f"--process_id={number}"], cwd=REPOSITORY, env=environment, **pipes)
                for number in range(2)
            ]
        )

    def finish(self, timeout: float = 900) -> list[str]:
        """What both said, once they have ended well."""
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in self.processes]
        finally:
            self.kill()
        assert [process.returncode for process in self.processes] == [0, 0], "\n\n".join(outputs)
        return outputs

    def signal_when(self, path: Path, lines: int, number: int, *signals: signal.Signals) -> None:
        """Sends signals to one process once a file has so many lines."""
        while not (path.exists() and len(path.read_text().splitlines()) >= lines):
            if any(process.poll() is not None for process in self.processes):
                self.kill()
                raise AssertionError("\n\n".join(process.communicate()[0] for process in self.processes))
            time.sleep(0.05)
        for each in signals:
            self.processes[number].send_signal(each)
            time.sleep(0.3)

    def kill(self) -> None:
        """Ends what still runs."""
        for process in self.processes:
            process.kill()


def smoke(recipe: str, data: str | Path, **changes: object) -> ConfigDict:
    """The smallest recipe on one dataset."""
    config = importlib.import_module(f"configs.{recipe}").get_config("smoke")
    config.data.mixture = str(data)
    config.update_from_flattened_dict(changes)
    return config


def run_config(data: str | Path) -> ConfigDict:
    """A run that a signal can be sent to: parameters split over both hosts, steps enough, evaluated at its end."""
    changes = {"mesh.data": 2, "mesh.fsdp": 4, "train.evaluate_every": 0, "train.checkpoint_every": 0}
    return smoke("pretrain_como", data, **changes, **{"train.num_steps": NUM_STEPS})


class Problem:
    """CoMo's loss on its first batch."""

    def __init__(self, data: str | Path):
        """Takes a dataset with actions."""
        self._config = smoke("pretrain_como", data)
        self._config.model.update({"idm_depth": 1, "tcl_weight": 0.0})
        self._model = build_model(self._config)
        # Keeps the gradient and goes nowhere.
        self._optimizer = optax.chain(optax.trace(0.0), optax.scale(0.0))
        params, frozen = self._model.partition(jax.jit(self._model.init)(jax.random.key(0)))
        state = TrainState(np.int32(0), params, frozen, self._optimizer.init(params), None)
        self._state = jax.tree.map(np.asarray, state)

    def gradient(self, mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
        """The loss, and its gradient by parameter, as the train step of a mesh computes them."""
        abstract = abstract_state(self._model, self._optimizer, mesh, use_ema=False)
        state = jax.tree.map(lambda x, plan: jax.device_put(x, plan.sharding), self._state, abstract)
        step = make_train_step(self._model, self._optimizer, mesh, abstract, seed=0)
        state, metrics = step(state, sharding.shard_batch(self._batch(mesh), mesh))
        trace = state.opt_state[0].trace
        whole = hosts.gather(trace) if jax.process_count() > 1 else jax.tree.map(np.asarray, trace)
        found = {"/".join(map(str, path)): value for path, value in traverse_util.flatten_dict(whole).items()}
        return {"loss": np.asarray(metrics["loss"]), **found}

    def _batch(self, mesh: jax.sharding.Mesh) -> FramePairs:
        config = self._config
        rows = sharding.batch_rows(mesh, config.data.batch_size)
        data = open_motion_data(config, batch_parts(config))
        return to_frame_pairs(next(iter(training_batches(config, data.reader, rows))))


def write_gradients(out: Path, data: str) -> None:
    """Those of tensor parallelism across the hosts, in a file."""
    found = Problem(data).gradient(sharding.make_mesh(*TENSOR_ACROSS))
    if hosts.is_first():
        np.savez(out.with_suffix(".npz"), **found)


def train_slowly(out: Path, data: str) -> None:
    """A run that takes long enough for a signal to come in between."""
    put = trainer.sharding.shard_batch

    def put_slowly(batch: object, mesh: jax.sharding.Mesh) -> object:
        time.sleep(0.15)
        return put(batch, mesh)

    trainer.sharding.shard_batch = put_slowly
    train(out, data)


def resume(out: Path, data: str) -> None:
    """The rest of the slow run."""
    train(out.parent / "train_slowly", data)


def train(out: Path, data: str) -> None:
    """A run."""
    pretrain(run_config(data), out)


def act(out: Path, data: str) -> None:
    """A policy's run with an evaluation and rollouts at its end."""
    changes = {"train.num_steps": 2, "train.evaluate_every": 0, "mesh.fsdp": 8, "mesh.data": 1}
    environment = {"evaluation.env": "tabletop:reach", "evaluation.env_workers": 1, "evaluation.execute": 4}
    train_policy(smoke("policy_diffusion", data, **changes, **environment), out)


TASKS = {
    "gradients": write_gradients,
    "train": train,
    "train_slowly": train_slowly,
    "resume": resume,
    "act": act,
}


def main(arguments: Sequence[str]) -> None:
    """Joins the job and does its tasks one after another."""
    cli.no_arguments(arguments)
    hosts.connect(share_sigterm=True)
    for task in flags.FLAGS.task:
        out = Path(flags.FLAGS.out)
        TASKS[task](out / task, flags.FLAGS.data)


if __name__ == "__main__":
    # --data is that of experiments.pretrain.
    flags.DEFINE_list("task", None, "What to do.")
    flags.DEFINE_string("out", None, "Directory of what comes of it.")
    hosts.define_flags()
    cli.run(main)
