"""When the loop saves, stops and gives up, with a step that trains nothing."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grain
import jax.numpy as jnp
import pytest

from como_jax.training.checkpoint import Checkpointer
from como_jax.training.loop import LoopConfig, NonFiniteError, check_finite, fit
from como_jax.training.train_state import TrainState
from como_jax.training.writers import NullWriter


class Recorder(NullWriter):
    """Remembers the scalars."""

    def __init__(self) -> None:
        self.written: dict[int, dict[str, float]] = {}

    def scalars(self, step: int, values: Any) -> None:
        self.written[step] = dict(values)


@dataclasses.dataclass
class Run:
    """What a run in `workdir` did."""

    workdir: Path
    seen: list[int] = dataclasses.field(default_factory=list)
    evaluated: list[int] = dataclasses.field(default_factory=list)
    writer: Recorder = dataclasses.field(default_factory=Recorder)

    def fit(self, config: LoopConfig, on_step: Callable[[int], float] = float) -> int:
        """Starts or resumes; `on_step` gives the loss of every step. Returns the last step."""
        batches = iter(grain.MapDataset.range(100).to_iter_dataset())
        state = TrainState(jnp.zeros((), jnp.int32), {"w": jnp.zeros(2)}, {}, (), None)
        checkpointer = Checkpointer(self.workdir)

        def step(state: TrainState, batch: int) -> tuple[TrainState, dict[str, Any]]:
            self.seen.append(int(batch))
            state = dataclasses.replace(state, step=state.step + 1)
            return state, {"loss": jnp.float32(on_step(int(state.step))), "grad_norm": jnp.ones(())}

        try:
            if checkpointer.latest_step() is not None:
                state = checkpointer.restore(state, batches)
            state = fit(
                state,
                step,
                batches,
                lambda batch: batch,
                config,
                checkpointer=checkpointer,
                writer=self.writer,
                evaluate=lambda state, step: self.evaluated.append(step),
                samples_per_step=1,
            )
        finally:
            checkpointer.close()
        return int(state.step)

    def saved(self) -> int | None:
        """The step of the newest checkpoint on disk."""
        checkpointer = Checkpointer(self.workdir)
        try:
            return checkpointer.latest_step()
        finally:
            checkpointer.close()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_run_logs_evaluates_and_saves_when_due_and_at_its_end(run: Run) -> None:
    config = LoopConfig(num_steps=5, log_every=2, evaluate_every=3, checkpoint_every=4)
    assert run.fit(config) == 5
    assert run.seen == [0, 1, 2, 3, 4]
    assert list(run.writer.written) == [2, 4, 5]
    assert run.writer.written[4]["train/loss"] == 4.0
    assert run.evaluated == [3, 5]
    assert run.saved() == 5


def test_a_trace_changes_no_numbers(run: Run, tmp_path: Path) -> None:
    traced = Run(tmp_path / "traced")
    for each, profile in ((run, ""), (traced, str(tmp_path / "trace"))):
        each.fit(LoopConfig(num_steps=5, log_every=1, profile=profile), lambda step: 1.0 / step)
    losses = [[values["train/loss"] for values in each.writer.written.values()] for each in (run, traced)]
    assert losses[0] == losses[1] and len(losses[0]) == 5
    assert [path.suffix for path in (tmp_path / "trace").glob("plugins/profile/*/*.pb")] == [".pb"]


def test_a_stopped_run_goes_on_with_the_next_batch(run: Run) -> None:
    assert run.fit(LoopConfig(num_steps=6, stop_after=2)) == 2
    assert run.saved() == 2
    assert run.fit(LoopConfig(num_steps=6)) == 6
    assert run.seen == [0, 1, 2, 3, 4, 5]


def test_a_finished_run_trains_no_further(run: Run) -> None:
    run.fit(LoopConfig(num_steps=2))
    assert run.fit(LoopConfig(num_steps=2)) == 2
    assert run.seen == [0, 1]


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint_before_it(run: Run) -> None:
    config = LoopConfig(num_steps=10, checkpoint_every=2)
    with pytest.raises(NonFiniteError, match="Step 5: loss not finite"):
        run.fit(config, lambda step: float("nan") if step == 5 else 1.0)
    assert run.saved() == 4


def test_a_step_that_is_not_finite_is_never_saved(run: Run) -> None:
    with pytest.raises(NonFiniteError, match="Step 4: loss not finite"):
        run.fit(LoopConfig(num_steps=10, checkpoint_every=2), lambda step: float("inf") if step == 4 else 1.0)
    assert run.saved() == 2


def test_all_terms_that_are_not_finite_are_named() -> None:
    metrics = {"mse": jnp.float32("nan"), "tcl": jnp.zeros(()), "grad_norm": jnp.float32("inf")}
    with pytest.raises(NonFiniteError, match="Step 7: mse, grad_norm not finite"):
        check_finite(7, metrics)


def terminate_at(when: int) -> Callable[[int], float]:
    """A step that asks this process to end."""

    def on_step(step: int) -> float:
        if step == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    return on_step


def test_sigterm_saves_and_the_same_command_goes_on(run: Run) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run.fit(LoopConfig(num_steps=6), terminate_at(3)) == 3
    assert run.saved() == 3
    assert signal.getsignal(signal.SIGTERM) is before
    assert run.fit(LoopConfig(num_steps=6)) == 6
    assert run.seen == [0, 1, 2, 3, 4, 5]


def test_sigterm_does_not_save_a_state_that_is_not_finite(run: Run) -> None:
    terminate = terminate_at(3)
    with pytest.raises(NonFiniteError, match="Step 3"):
        run.fit(LoopConfig(num_steps=6), lambda step: terminate(step) * (float("nan") if step == 3 else 1.0))
    assert run.saved() is None
