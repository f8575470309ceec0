"""Two processes with four devices each compute, stop, resume and act like one."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest

from como_jax.data.motion_data import open_motion_data
from como_jax.data.pipeline import training_batches
from como_jax.motion.models import batch_parts, build_model
from como_jax.training import sharding
from como_jax.training.checkpoint import Checkpointer
from como_jax.training.train_state import TrainState
from como_jax.training.train_step import build_training
from tests.training.two_hosts import NUM_STEPS, Job, Problem, run_config

pytestmark = pytest.mark.slow


class Done(NamedTuple):
    """What two jobs left: one that was asked to stop, and one that did the rest and all else."""

    folder: Path
    stopped: list[str]
    stopped_at: list[int]
    outputs: list[str]


@pytest.fixture(scope="module")
def done(tabletop_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    # Once, whichever of pytest's workers need it.
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, summary = base / "two_hosts", base / "two_hosts.json"
    with (base / "two_hosts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not summary.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            summary.write_text(json.dumps(run_jobs(folder, tabletop_dataset)))
    return Done(folder, *json.loads(summary.read_text()))


def run_jobs(folder: Path, dataset: Path) -> tuple[list[str], list[int], list[str]]:
    """Both jobs: what the first said and saved, and what the second said."""
    job = Job.start("train_slowly", folder, dataset)
    # The second signal comes while the first is agreed upon, or while the checkpoint is written.
    job.signal_when(folder / "train_slowly" / "metrics.jsonl", 3, 1, signal.SIGTERM, signal.SIGTERM)
    stopped = job.finish()
    steps = saved_steps(folder / "train_slowly")
    return stopped, steps, Job.start("resume,train,gradients,act", folder, dataset).finish()


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def metrics(workdir: Path, prefixes: tuple[str, ...] = ("train/",)) -> list[dict[str, float]]:
    """All that was logged of some kinds, in order."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = [{name: line[name] for name in line if name.startswith(("step", *prefixes))} for line in lines]
    return [line for line in kept if len(line) > 1]


def test_loss_and_gradients_of_two_hosts_are_those_of_one_device(done: Done, tabletop_dataset: Path) -> None:
    found = dict(np.load(done.folder / "gradients.npz"))
    expected = Problem(tabletop_dataset).gradient(sharding.make_mesh(devices=jax.devices()[:1]))
    assert found.keys() == expected.keys()
    scale = max(np.abs(value).max() for name, value in expected.items() if name != "loss")
    assert scale > 1e-3
    for name, value in expected.items():
        # Equal to float32's rounding of sums in another order.
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=1e-6 * scale, err_msg=name)


def test_sigterm_to_one_host_stops_both_at_one_saved_step(done: Done) -> None:
    [step] = done.stopped_at
    assert 3 <= step < NUM_STEPS
    assert f"Stopped at step {step} on SIGTERM" in done.stopped[0]
    # The same step of both, whichever got the signal.
    data = done.folder / "train_slowly" / "checkpoints" / str(NUM_STEPS) / "data"
    assert sorted(path.name for path in data.glob("process*")) == ["process_0-of-2.json", "process_1-of-2.json"]


def test_the_restarted_job_ends_like_one_that_was_never_stopped(done: Done) -> None:
    slow, whole = (metrics(done.folder / name) for name in ("train_slowly", "train"))
    assert [line["step"] for line in slow] == list(range(1, NUM_STEPS + 1))
    assert slow == whole


def test_only_the_first_host_speaks_and_writes(done: Done) -> None:
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in done.outputs[0]
    assert "Run: " not in done.outputs[1] and f"/{NUM_STEPS}" not in done.outputs[1]
    assert "On training episodes" not in done.outputs[1]
    for name in ("train", "act"):
        assert len(list((done.folder / name / "tensorboard").iterdir())) == 1
    assert len(metrics(done.folder / "train", ("eval_",))) == 1
    assert not list(done.folder.rglob("*.partial-*"))


def test_a_policy_is_judged_and_acts_while_two_hosts_train_it(done: Done) -> None:
    [last] = metrics(done.folder / "act", ("eval_", "success/"))
    assert last["step"] == 2 and 0 <= last["success/mean"] <= 1
    assert np.isfinite(last["eval_train/action_mse"])
    assert "Success: " in done.outputs[0] and "Success: " not in done.outputs[1]
    assert (done.folder / "act" / "policy.json").exists()


def test_a_checkpoint_of_two_hosts_opens_on_any_devices_of_one(
    done: Done, tabletop_dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(done.folder / "train" / "checkpoints", tmp_path / "checkpoints")
    config = run_config(tabletop_dataset)
    model, states, batches = build_model(config), [], []
    for sizes in ((1, 1, 1), (1, 2, 1), (2, 2, 2)):
        mesh = sharding.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        iterator = iter(training_batches(config, open_motion_data(config, batch_parts(config)).reader))
        checkpointer = Checkpointer(tmp_path)
        states.append(checkpointer.restore(build_training(config, model, mesh).abstract, iterator))
        checkpointer.close()
        batches.append(next(iterator))
    assert isinstance(states[0], TrainState) and int(states[0].step) == NUM_STEPS
    for state in states[1:]:
        chex.assert_trees_all_equal(state, states[0])
    fresh = iter(training_batches(config, open_motion_data(config, batch_parts(config)).reader))
    for _ in range(NUM_STEPS):
        next(fresh)
    expected = next(fresh)
    for batch in batches:
        chex.assert_trees_all_equal(batch, expected)
