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
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from como_jax.errors import NonFiniteError
from como_jax.training.checkpoint import Checkpointer
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
    """

    num_steps: int
    stop_after: int = 0
    log_every: int = 50
    evaluate_every: int = 0
    checkpoint_every: int = 1000


class StopRequest:
    """Turns SIGTERM into a flag that the loop reads between steps."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _handle(self, *_: object) -> None:
        self.requested = True


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
) -> TrainState:
    """Trains until the last step, a requested stop or a number that is not finite.

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

    Returns:
      The last state, which is also saved.

    Raises:
      NonFiniteError: names step and term; the last checkpoint is from before it.
    """
    step = int(state.step)
    last = min(config.num_steps, config.stop_after or config.num_steps)
    pending: tuple[int, Metrics] | None = None
    meter = RateMeter()

    def inspect(step: int, metrics: Metrics) -> None:
        check_finite(step, metrics)
        if watch is not None:
            watch(step, metrics)

    with (
        StopRequest() as stop,
        tqdm(total=config.num_steps, initial=step, unit="step", disable=None) as bar,
        logging_redirect_tqdm([logging.getLogger("como_jax")]),
    ):
        while step < last and not stop.requested:
            state, metrics = train_step(state, put_batch(next(batches)))
            step += 1
            # Reading the metrics of the step before leaves the device at work on this one.
            if pending is not None:
                inspect(*pending)
            pending = (step, metrics)
            bar.update()
            evaluation_due = _due(step, config.evaluate_every) or step == config.num_steps
            checkpoint_due = _due(step, config.checkpoint_every) or step == last
            if _due(step, config.log_every) or step == config.num_steps:
                rate = meter.rate(step, metrics)
                _log(writer, bar, step, config.num_steps, metrics, rate, (samples_per_step, unit))
            if evaluation_due or checkpoint_due:
                inspect(step, metrics)
            if evaluation_due:
                evaluate(state, step)
            if checkpoint_due:
                checkpointer.save(step, state, batches)
            if evaluation_due or checkpoint_due:
                meter.restart(step)
        if pending is not None:
            inspect(*pending)
        if stop.requested:
            logger.info("Stopping at step %d on SIGTERM; run the same command to go on.", step)
            checkpointer.save(step, state, batches)
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
