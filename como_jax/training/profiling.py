"""A trace of a few steps of a run, which TensorBoard's profile plugin and xprof open."""

from __future__ import annotations

import logging

import jax
from etils import epath

from como_jax.errors import RunError
from como_jax.training.train_state import Metrics

logger = logging.getLogger(__name__)

# The first step compiles, and those after it still warm up caches and clocks.
WARM_UP_STEPS = 3
TRACED_STEPS = 3


class StepTrace:
    """Writes the trace of this process's steps 4 to 6, or of fewer where the block is left before.

    The device is waited for where the trace begins and ends, so that it holds whole steps; no number changes.
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
                raise RunError(f"--config.profile {directory} cannot be written: {error}") from error

    def __enter__(self) -> StepTrace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._stop()
        elif self._directory and self._steps < WARM_UP_STEPS:
            logger.warning("No trace in %s: it begins after %d steps.", self._directory, WARM_UP_STEPS)

    def after_step(self, metrics: Metrics) -> None:
        """Begins or ends the trace where that is due; `metrics` are what to wait for."""
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
