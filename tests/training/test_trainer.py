"""When a run logs, evaluates, saves, stops and gives up, with a step that trains nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from como_jax.errors import NonFiniteError, RunError
from como_jax.nn.model_def import ModelDef
from como_jax.training import sharding, trainer
from como_jax.training.checkpoint import Checkpointer
from como_jax.training.models import Unit
from como_jax.training.run import NOTHING_ELSE, Allowed
from como_jax.training.train_state import TrainState, abstract_state
from como_jax.training.train_step import Training
from como_jax.training.trainer import Task, train
from como_jax.training.writers import MetricWriter


class Still(nnx.Module):
    """Parameters that no step changes."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        del rngs
        self.body = nnx.Param(jnp.zeros(2))


def terminate() -> None:
    """Asks this process to end."""
    os.kill(os.getpid(), signal.SIGTERM)


@dataclasses.dataclass
class Run:
    """What the processes of a run in `workdir` did, one after the other.

    Attributes:
      seen: the batches that were trained on.
      evaluated: the steps that were evaluated.
      on_step: gives the loss of a step.
      on_evaluation: called before an evaluation writes its metrics.
      changes: fields of `Task` in place of the usual ones.
    """

    workdir: Path
    seen: list[int] = dataclasses.field(default_factory=list)
    evaluated: list[int] = dataclasses.field(default_factory=list)
    on_step: Callable[[int], float] = float
    on_evaluation: Callable[[int], None] = lambda step: None
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def start(self, *, profile: str = "", allowed: Allowed = NOTHING_ELSE, **schedule: int) -> int:
        """Starts or resumes the run; returns its last step."""
        sections = {"log_every": 50, "evaluate_every": 0, "checkpoint_every": 1000, "stop_after": 0, **schedule}
        config = ConfigDict({"family": "still", "seed": 0, "profile": profile, "optim": {}, "data": {"batch_size": 1}})
        config.train = {"dtype": "float32", "keep_checkpoints": 2, **sections}
        task = Task(
            model=ModelDef.create(Still),
            batches=grain.MapDataset.range(100).to_iter_dataset(),
            to_batch=lambda batch: np.full(1, batch),
            initialise=lambda state: state,
            evaluate=self._evaluate,
            unit=Unit("batches", 1),
        )
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "build_training", self._build_training)
            state = train(dataclasses.replace(task, **self.changes), config, self.workdir, mesh, allowed)
        return int(state.step)

    def logged(self, name: str) -> dict[int, float]:
        """All that was logged under a name, by step."""
        lines = [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]
        found = [(line["step"], line[name]) for line in lines if name in line]
        assert len(dict(found)) == len(found), "a step was logged twice"
        return dict(found)

    def saved(self) -> int | None:
        """The step of the newest checkpoint."""
        with Checkpointer(self.workdir) as checkpointer:
            return checkpointer.latest_step()

    def _build_training(self, config: ConfigDict, model: ModelDef, mesh: jax.sharding.Mesh) -> Training:
        def step(state: TrainState, batch: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
            self.seen.append(int(batch[0]))
            state = dataclasses.replace(state, step=state.step + 1)
            return state, {"loss": jnp.float32(self.on_step(int(state.step))), "grad_norm": jnp.ones(())}

        optimizer = optax.identity()
        return Training(optimizer, abstract_state(model, optimizer, mesh, use_ema=False), step)

    def _evaluate(self, params: Any, step: int, writer: MetricWriter) -> dict[str, float]:
        self.on_evaluation(step)
        self.evaluated.append(step)
        writer.scalars(step, {"eval_val/score": 1.0})
        return {"eval_val/score": 1.0}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_a_run_logs_evaluates_and_saves_when_due_and_at_its_end(run: Run) -> None:
    assert run.start(num_steps=5, log_every=2, evaluate_every=3, checkpoint_every=4) == 5
    assert run.seen == [0, 1, 2, 3, 4]
    assert run.logged("train/loss") == {2: 2.0, 4: 4.0, 5: 5.0}
    assert run.evaluated == [3, 5]
    assert run.saved() == 5
    assert {path.name for path in (run.workdir / "checkpoints").iterdir() if path.is_dir()} == {"4", "5"}


def test_a_trace_changes_no_numbers(run: Run, tmp_path: Path) -> None:
    traced = Run(tmp_path / "traced")
    for each, profile in ((run, ""), (traced, str(tmp_path / "trace"))):
        each.on_step = lambda step: 1.0 / step
        each.start(num_steps=5, log_every=1, profile=profile)
    assert run.logged("train/loss") == traced.logged("train/loss") and len(run.logged("train/loss")) == 5
    assert [path.suffix for path in (tmp_path / "trace").glob("plugins/profile/*/*.pb")] == [".pb"]


def test_a_stopped_run_goes_on_with_the_next_batch(run: Run) -> None:
    assert run.start(num_steps=6, stop_after=2) == 2
    assert run.saved() == 2
    assert run.start(num_steps=6) == 6
    assert run.seen == [0, 1, 2, 3, 4, 5]


def test_a_finished_run_trains_no_further_and_is_evaluated_once(run: Run) -> None:
    assert [run.start(num_steps=2), run.start(num_steps=2)] == [2, 2]
    assert run.seen == [0, 1] and run.evaluated == [2]


def test_a_finished_run_is_lengthened_when_asked_and_goes_on_with_the_next_batch(run: Run) -> None:
    run.start(num_steps=2)
    with pytest.raises(RunError, match=r"train\.num_steps was 2 and is 4\. `lengthen` resumes the run"):
        run.start(num_steps=4)
    for again in range(2):
        assert run.start(num_steps=4, allowed=Allowed(lengthen=True)) == 4, again
    assert run.start(num_steps=4) == 4
    assert run.seen == [0, 1, 2, 3] and run.evaluated == [2, 4]
    with pytest.raises(RunError, match="takes a larger config.train.num_steps than 4, not 3"):
        run.start(num_steps=3, allowed=Allowed(lengthen=True))
    kept = [json.loads((run.workdir / name).read_text())["train"] for name in ("config_before_1.json", "config.json")]
    assert [section["num_steps"] for section in kept] == [2, 4]


def test_a_run_goes_on_with_other_data_only_when_asked(run: Run) -> None:
    run.changes = {"identify": lambda: {"data/arm": {"steps of train": 5}}}
    run.start(num_steps=4, stop_after=2)
    run.changes = {"identify": lambda: {"data/arm": {"steps of train": 3}}}
    with pytest.raises(RunError, match=r"data/arm \(steps of train 5, now 3\)\. .*`other_data`"):
        run.start(num_steps=4)
    assert run.seen == [0, 1]
    assert run.start(num_steps=4, stop_after=3, allowed=Allowed(other_data=True)) == 3
    assert run.start(num_steps=4) == 4 and run.seen == [0, 1, 2, 3]


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint_before_it(run: Run) -> None:
    run.on_step = lambda step: float("nan") if step == 5 else 1.0
    with pytest.raises(NonFiniteError, match="Step 5: loss not finite"):
        run.start(num_steps=10, checkpoint_every=2)
    assert run.saved() == 4


def test_a_step_that_is_not_finite_is_never_saved(run: Run) -> None:
    run.on_step = lambda step: float("inf") if step == 4 else 1.0
    with pytest.raises(NonFiniteError, match="Step 4: loss not finite"):
        run.start(num_steps=10, checkpoint_every=2)
    assert run.saved() == 2


def terminate_at(when: int, loss: float = 1.0) -> Callable[[int], float]:
    """The loss of steps, one of which asks this process to end."""

    def on_step(step: int) -> float:
        if step == when:
            terminate()
        return loss if step == when else 1.0

    return on_step


def test_sigterm_saves_and_the_same_command_goes_on(run: Run) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run.on_step = terminate_at(3)
    assert run.start(num_steps=6) == run.saved() == 3
    assert signal.getsignal(signal.SIGTERM) is before
    assert run.start(num_steps=6) == 6
    assert run.seen == [0, 1, 2, 3, 4, 5]


def test_sigterm_does_not_save_a_state_that_is_not_finite(run: Run) -> None:
    run.on_step = terminate_at(3, float("nan"))
    with pytest.raises(NonFiniteError, match="Step 3"):
        run.start(num_steps=6)
    assert run.saved() is None


def test_sigterm_leaves_the_evaluation_to_the_resumed_run(run: Run) -> None:
    run.on_step = terminate_at(2)
    assert run.start(num_steps=3, evaluate_every=1) == run.saved() == 2
    assert run.evaluated == [1]
    assert run.start(num_steps=3, evaluate_every=1) == 3
    assert run.evaluated == [1, 2, 3]


def test_further_signals_do_not_break_the_save(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = Checkpointer.wait

    def wait_under_fire(self: Checkpointer) -> None:
        terminate()
        wait(self)
        terminate()

    run.on_step = terminate_at(2)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "wait", wait_under_fire)
        patch.setattr(Checkpointer, "close", lambda self: self._manager.close())
        assert run.start(num_steps=50) == 2
    assert run.saved() == 2


def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for(run: Run) -> None:
    def fail(step: int) -> None:
        raise OSError("the simulator is gone")

    run.on_evaluation = fail
    with pytest.raises(OSError, match="the simulator is gone"):
        run.start(num_steps=2, log_every=1)
    assert run.saved() == 2
    run.on_evaluation = lambda step: None
    for _ in range(2):
        assert run.start(num_steps=2, log_every=1) == 2
    assert run.logged("eval_val/score") == {2: 1.0}
    assert run.logged("train/loss") == {1: 1.0, 2: 2.0}


def test_a_command_that_fails_before_the_first_step_can_be_corrected(run: Run) -> None:
    def fail(state: TrainState) -> TrainState:
        raise RunError("/nowhere holds no run")

    run.changes = {"initialise": fail}
    with pytest.raises(RunError, match="/nowhere holds no run"):
        run.start(num_steps=2)
    assert not (run.workdir / "config.json").exists()
    run.changes = {}
    assert run.start(num_steps=2) == 2
