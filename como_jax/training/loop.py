"""The training loop: reads top to bottom, whatever is trained."""

from __future__ import annotations

import dataclasses
import logging
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from como_jax import hosts
from como_jax.errors import NonFiniteError
from como_jax.training.checkpoint import Checkpointer
from como_jax.training.profiling import StepTrace
from como_jax.training.train_state import Metrics, TrainState
from como_jax.training.writers import MetricWriter, NullWriter

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """When the loop ends and what it does on the way.

    Attributes:
      num_steps: updates of the whole run; the learning-rate schedule ends there.
      stop_after: updates after which this process saves and stops, to be resumed later; 0 for `num_steps`.
      log_every, evaluate_every, checkpoint_every: in steps; 0 turns evaluation or checkpoints on the way off.
      profile: folder that gets a trace of a few steps of the first host; "" for none.
    """

    num_steps: int
    stop_after: int = 0
    log_every: int = 50
    evaluate_every: int = 0
    checkpoint_every: int = 1000
    profile: str = ""

    @property
    def last_step(self) -> int:
        """After which this process stops."""
        return min(self.num_steps, self.stop_after or self.num_steps)

    def log_due(self, step: int) -> bool:
        """Whether numbers of this step are written."""
        return _due(step, self.log_every) or step == self.num_steps

    def evaluation_due(self, step: int) -> bool:
        """Whether the state after this step is judged."""
        return _due(step, self.evaluate_every) or step == self.num_steps

    def checkpoint_due(self, step: int) -> bool:
        """Whether the state after this step is saved."""
        return _due(step, self.checkpoint_every) or step == self.last_step


class StopRequest:
    """Turns SIGTERM into a step to stop at, the same on all hosts whichever of them got it.

    In a job of several processes JAX listens to SIGTERM, and agrees on a step that no host has finished yet; alone,
    this does, and the step is the next. Further signals change nothing until the block is left.
    """

    def __init__(self) -> None:
        self._requested, self._shared = False, False

    def __enter__(self) -> StopRequest:
        self._shared = jax.distributed.is_initialized()
        if not self._shared:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._shared:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; all hosts call it after every step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._shared else self._requested

    def _handle(self, *_: object) -> None:
        self._requested = True


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batches: grain.DatasetIterator,
    put_batch: Callable[[Any], Any],
    config: LoopConfig,
    *,
    checkpointer: Checkpointer,
    writer: MetricWriter | NullWriter,
    evaluate: Callable[[TrainState, int], None],
    samples_per_step: int,
    unit: str = "pairs",
    watch: Callable[[int, Metrics], None] | None = None,
    missed_evaluation: bool = False,
) -> TrainState:
    """Trains until the last step, SIGTERM or a number that is not finite.

    What is saved and evaluated at one step is saved first. SIGTERM leaves out the evaluation that is due, for the
    resumed run to make up for.

    Args:
      state: to start from; its step says where the run is.
      train_step: the jitted update, which donates the state.
      batches: iterator of host batches, positioned after the state's step.
      put_batch: host batch to sharded arrays.
      config: when to do what.
      checkpointer: saves state and iterator together.
      writer: takes the numbers.
      evaluate: called with state and step, writes what it finds itself.
      samples_per_step: what a step trains on, for the displayed rate.
      unit: what these are.
      watch: called with every step and its metrics, at least once.
      missed_evaluation: whether `state` is still to be judged, which an earlier process should have done.

    Returns:
      The last state, which is also saved.

    Raises:
      NonFiniteError: names step and term; the last checkpoint is from before it.
    """
    step = int(state.step)
    pending: tuple[int, Metrics] | None = None
    meter = RateMeter()

    def inspect(step: int, metrics: Metrics) -> None:
        check_finite(step, metrics)
        if watch is not None:
            watch(step, metrics)

    with (
        StopRequest() as stop,
        StepTrace(config.profile if hosts.is_first() else "") as trace,
        tqdm(total=config.num_steps, initial=step, unit="step", disable=None if hosts.is_first() else True) as bar,
        logging_redirect_tqdm([logging.getLogger("como_jax")]),
    ):
        stopping = False
        if missed_evaluation:
            evaluate(state, step)
        while step < config.last_step and not stopping:
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = train_step(state, put_batch(next(batches)))
            step += 1
            trace.after_step(metrics)
            stopping = stop.reached(step)
            # Reading the metrics of the step before leaves the device at work on this one.
            if pending is not None:
                inspect(*pending)
            pending = (step, metrics)
            bar.update()
            if config.log_due(step):
                rate = meter.rate(step, metrics)
                _log(writer, bar, step, config.num_steps, metrics, rate, (samples_per_step, unit))
            saving = config.checkpoint_due(step) or stopping
            evaluating = config.evaluation_due(step) and not stopping
            if saving or evaluating:
                inspect(*pending)
                pending = None
            if saving:
                checkpointer.save(step, state, batches)
            if evaluating:
                evaluate(state, step)
            if saving or evaluating:
                meter.restart(step)
        if pending is not None:
            inspect(*pending)
        # While further signals do no harm.
        checkpointer.wait()
        if stopping:
            logger.info("Stopped at step %d on SIGTERM; run the same command to go on.", step)
    return state


class RateMeter:
    """Steps per second since the last reading; the first one, whose steps include compilation, has none."""

    def __init__(self) -> None:
        self._start: tuple[int, float] | None = None

    def rate(self, step: int, metrics: Metrics) -> float:
        """Steps per second, or NaN while nothing was measured; waits for `metrics`."""
        jax.block_until_ready(metrics)
        now = time.monotonic()
        steps, seconds = (step - self._start[0], now - self._start[1]) if self._start else (0, 0.0)
        self._start = (step, now)
        return steps / seconds if steps else float("nan")

    def restart(self, step: int) -> None:
        """Starts over, so that evaluation and saving do not count."""
        self._start = (step, time.monotonic())


def check_finite(step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Raises NonFiniteError that names the step and every term that is NaN or infinite."""
    bad = [name for name, value in metrics.items() if not np.all(np.isfinite(np.asarray(value)))]
    if bad:
        raise NonFiniteError(
            f"Step {step}: {', '.join(bad)} not finite. The last checkpoint is from before this step; lower the "
            "learning rate or look at the data, then run again."
        )


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0


def _log(
    writer: MetricWriter | NullWriter,
    bar: tqdm,
    step: int,
    num_steps: int,
    metrics: Metrics,
    rate: float,
    samples: tuple[int, str],
) -> None:
    per_step, unit = samples
    values = {f"train/{name}": float(value) for name, value in metrics.items()}
    if np.isfinite(rate):
        values[f"speed/{unit}_per_second"] = rate * per_step
    writer.scalars(step, values)
    parts = [f"loss {values.get('train/loss', float('nan')):.4f}"]
    if np.isfinite(rate):
        parts.append(f"{rate * per_step:.0f} {unit}/s")
    bar.set_postfix_str(", ".join(parts))
    if bar.disable:
        left = [f"{(num_steps - step) / rate:.0f} s left"] if np.isfinite(rate) else []
        logger.info("step %d/%d  %s", step, num_steps, "  ".join([*parts, *left]))
