"""Serves the policy of a run, computed by JAX."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from como_jax.errors import NonFiniteError, UsageError
from como_jax.evaluation.rollouts.policy_runner import PolicyRunner, load_policy
from como_jax.serving.policy import PolicyInputs, PolicyOptions
from como_jax.spec.control import ControlConfig, Controller
from como_jax.spec.interface import History, PolicySpec
from como_jax.training import sharding

logger = logging.getLogger("como_jax.serve")


class JaxPolicy:
    """A `ServedPolicy`.

    Attributes:
      runner: computes the action chunks.
    """

    def __init__(self, runner: PolicyRunner, options: PolicyOptions):
        spec = runner.spec
        self.inputs = PolicyInputs(spec.cameras, spec.state_size, spec.uses_text)
        self.runner, self._seed, self._sessions = runner, options.seed, itertools.count()
        self._control = None
        if not options.whole_chunks:
            self._control = ControlConfig(options.execute or 0, options.ensemble).resolve(spec.chunk)
        self.metadata: Mapping[str, Any] = _describe(spec, self._control) | {"step": runner.step}

    @classmethod
    def load(cls, workdir: epath.PathLike, options: PolicyOptions) -> JaxPolicy:
        """Loads the newest checkpoint of a run and compiles the policy.

        Raises:
          UsageError: there is no policy, or the options do not suit it.
        """
        policy = cls(load_policy(workdir, sharding.make_mesh(), options.dataset, options.sampling), options)
        policy._warm_up()
        return policy

    def new_session(self) -> JaxSession:
        """Returns a session with noise of its own."""
        return JaxSession(self.runner, self._control, (self._seed, next(self._sessions)))

    def _warm_up(self) -> None:
        """Compiles the policy, so that no client has to wait for it."""
        begin, size = time.monotonic(), self.runner.spec.image_size
        images = {camera: np.zeros((size, size, 3), np.uint8) for camera in self.inputs.cameras}
        try:
            self.new_session().act(images, np.zeros(self.inputs.state_size, np.float32), "warm up")
        except UsageError as error:
            # A policy with stored embeddings of instructions, for example, does not know this one.
            logger.info("The policy is compiled at the first request: %s", error)
        else:
            logger.info("Compiled in %.1f s", time.monotonic() - begin)


class JaxSession:
    """A `ServedSession`."""

    def __init__(self, runner: PolicyRunner, control: ControlConfig | None, seeds: tuple[int, int]):
        """Begins a session.

        Args:
          runner: of the policy.
          control: how chunks are carried out; None leaves it to the client.
          seeds: of the noise: the server's, and the number of the session.
        """
        self._runner, self._control, self._seeds = runner, control, seeds
        self._controller: Controller | None = None
        self._chunks = 0

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, prompt: str) -> np.ndarray:
        """See `ServedSession`; raises NonFiniteError for actions that are not finite."""
        if self._controller is None:
            self._controller = Controller(self._runner.spec, self._control or ControlConfig())
        controller = self._controller
        controller.observe(images, state)
        if self._control is None:
            return self._sample(controller.history(prompt))
        if controller.needs_chunk():
            controller.add_chunk(self._sample(controller.history(prompt)))
        return controller.next_action()[None]

    def reset(self) -> None:
        """Begins another episode."""
        self._controller = None

    def _sample(self, history: History) -> np.ndarray:
        chunk = self._runner.sample([history], [(*self._seeds, self._chunks)])[0]
        self._chunks += 1
        if not np.isfinite(chunk).all():
            raise NonFiniteError("The policy returned an action that is not finite.")
        return chunk


def _describe(spec: PolicySpec, control: ControlConfig | None) -> dict[str, Any]:
    """The metadata for clients."""
    if control is None and spec.instants > 1:
        logger.warning(
            "The policy sees %d images of each camera, %d steps apart. Every request counts as one step, so clients "
            "must ask at every step; with execute or ensemble the server carries out the chunks itself.",
            spec.instants,
            spec.stride,
        )
    return {
        "action_horizon": spec.chunk if control is None else 1,
        "action_dim": spec.action_size,
        "control_rate": spec.control_rate,
        "instants": spec.instants,
        "stride": spec.stride,
        "control": None if control is None else dataclasses.asdict(control),
    }
