"""What looks after a run while it trains: progress, numbers that are not finite, SIGTERM, traces, codebooks."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from como_jax import hosts
from como_jax.errors import NonFiniteError, RunError
from como_jax.training.train_state import Metrics
from como_jax.training.writers import MetricWriter, NullWriter

logger = logging.getLogger(__name__)

Watch = Callable[[int, Metrics], None]
"""Gets every step and its metrics."""

# The first step compiles, and those after it still warm up caches and clocks.
WARM_UP_STEPS = 3
TRACED_STEPS = 3
COLLAPSED_SHARE = 0.1


class Progress:
    """Checks the metrics of every step, writes them when due, and shows a progress bar with rate and time left."""

    def __init__(
        self,
        writer: MetricWriter | NullWriter,
        *,
        step: int,
        num_steps: int,
        unit: str,
        per_step: int,
        watch: Watch | None = None,
    ):
        """Begins at a step.

        Args:
          writer: gets the metrics.
          step: updates done so far.
          num_steps: updates of the whole run.
          unit: what the rate counts.
          per_step: how many of them a step has.
          watch: gets every step and its metrics.
        """
        self._writer, self._watch = writer, watch
        self._num_steps, self._unit, self._per_step = num_steps, unit, per_step
        self._pending: tuple[int, Metrics] | None = None
        # The first steps, which include compilation, have no rate.
        self._clock: tuple[int, float] | None = None
        self._bar = tqdm(total=num_steps, initial=step, unit="step", disable=None if hosts.is_first() else True)
        self._redirect = logging_redirect_tqdm([logging.getLogger("como_jax")])

    def __enter__(self) -> Progress:
        self._redirect.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._redirect.__exit__(*error)
        self._bar.close()

    def after_step(self, step: int, metrics: Metrics, *, log: bool) -> None:
        """Takes the metrics of a step, and checks those of the step before, so that the device is not waited for.

        Raises:
          NonFiniteError: a number of the step before is not finite.
        """
        self.check()
        self._pending = (step, metrics)
        self._bar.update()
        if log:
            self._log(step, metrics)

    def check(self) -> None:
        """Checks the metrics of the last step, for which it waits.

        Raises:
          NonFiniteError: a number is not finite.
        """
        if self._pending is not None:
            check_finite(*self._pending)
            if self._watch is not None:
                self._watch(*self._pending)
        self._pending = None

    def restart_clock(self, step: int) -> None:
        """Starts the rate anew, so that the time of evaluation and saving does not count."""
        self._clock = (step, time.monotonic())

    def _log(self, step: int, metrics: Metrics) -> None:
        values = {f"train/{name}": float(value) for name, value in metrics.items()}
        steps_per_second = self._rate(step)
        parts, left = [f"loss {values.get('train/loss', float('nan')):.4f}"], []
        if steps_per_second:
            rate = steps_per_second * self._per_step
            values[f"speed/{self._unit}_per_second"] = rate
            parts.append(f"{rate:.0f} {self._unit}/s")
            left.append(f"{(self._num_steps - step) / steps_per_second:.0f} s left")
        self._writer.scalars(step, values)
        self._bar.set_postfix_str(", ".join(parts))
        if self._bar.disable:
            logger.info("step %d/%d  %s", step, self._num_steps, "  ".join([*parts, *left]))

    def _rate(self, step: int) -> float:
        """Steps a second since the clock was started, which is started anew; 0.0 where nothing was measured."""
        begin, now = self._clock, time.monotonic()
        self._clock = (step, now)
        return (step - begin[0]) / (now - begin[1]) if begin is not None and step > begin[0] else 0.0


def check_finite(step: int, metrics: Mapping[str, jax.Array]) -> None:
    """Raises NonFiniteError that names the step and every metric that is NaN or infinite."""
    bad = [name for name, value in metrics.items() if not np.all(np.isfinite(np.asarray(value)))]
    if bad:
        raise NonFiniteError(
            f"Step {step}: {', '.join(bad)} not finite. The last checkpoint is from before this step; lower the "
            "learning rate or look at the data, then run again."
        )


class StopRequest:
    """Turns SIGTERM into a step to stop at, which is the same on all hosts, whichever of them got the signal.

    In a job of several processes JAX listens to SIGTERM, and agrees on a step that no host has finished yet. A single
    process listens itself, and stops after the step that it is at. Further signals change nothing until the block is
    left.
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
        """Whether to stop after this step; all hosts must call it after every step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._shared else self._requested

    def _handle(self, *_: object) -> None:
        self._requested = True


class StepTrace:
    """Writes a trace of this process's steps 4 to 6, which TensorBoard's profile plugin and xprof open.

    It holds fewer steps where the block is left earlier. The device is waited for where the trace begins and ends, so
    that it holds whole steps; no number changes.
    """

    def __init__(self, directory: epath.PathLike):
        """Takes the folder of the trace; "" for none.

        Raises:
          RunError: the folder cannot be made.
        """
        self._directory, self._steps, self._active = str(directory), 0, False
        if self._directory:
            try:
                epath.Path(directory).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunError(f"config.profile: the folder {directory} cannot be written: {error}") from error

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._stop()
        elif self._directory and self._steps < WARM_UP_STEPS:
            logger.warning("No trace in %s: it begins after %d steps.", self._directory, WARM_UP_STEPS)

    def after_step(self, metrics: Metrics) -> None:
        """Begins or ends the trace where that is due, and waits for `metrics` then."""
        if not self._directory:
            return
        self._steps += 1
        if self._steps == WARM_UP_STEPS:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(self._directory)
            self._active = True
        elif self._active and self._steps == WARM_UP_STEPS + TRACED_STEPS:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        self._active = False
        jax.profiler.stop_trace()
        traced = self._steps - WARM_UP_STEPS
        logger.info("Traced %d steps: pip install xprof, then tensorboard --logdir %s", traced, self._directory)


class CollapseWatch:
    """Warns of a collapsed codebook: one whose perplexity stays under a tenth of its size for `patience` steps."""

    def __init__(self, patience: int):
        self._patience = patience
        self._since: int | None = None
        self._warned = False

    def __call__(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of one step; those of a model without a codebook are ignored."""
        share = metrics.get("perplexity_share")
        if share is None:
            return
        if float(share) >= COLLAPSED_SHARE:
            self._since, self._warned = None, False
            return
        self._since = step if self._since is None else self._since
        if step - self._since + 1 >= self._patience and not self._warned:
            self._warned = True
            logger.warning(
                "Step %d: the codebook has collapsed. Its perplexity has been under %.0f %% of its size for %d steps "
                "(now %.1f %%). Try model.bottleneck.replace_below=0.1, another kind, or a lower learning rate.",
                step,
                100 * COLLAPSED_SHARE,
                step - self._since + 1,
                100 * float(share),
            )
