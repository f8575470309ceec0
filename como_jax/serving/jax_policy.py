"""The policy of a run, computed by JAX, as the server asks for it."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from como_jax.envs.base import Sight
from como_jax.errors import NonFiniteError, UsageError
from como_jax.evaluation.rollouts.policy_runner import PolicyRunner, load_policy
from como_jax.policies.controller import ControlConfig, Controller
from como_jax.policies.spec import PolicySpec, Scene
from como_jax.serving.options import PolicyOptions
from como_jax.serving.policy import PolicyInputs
from como_jax.training import sharding

logger = logging.getLogger("como_jax.serve")


class JaxPolicy:
    """See `como_jax.serving.policy.ServedPolicy`.

    Attributes:
      runner: computes its chunks.
    """

    def __init__(self, runner: PolicyRunner, options: PolicyOptions):
        """Takes the policy and how it acts."""
        spec = runner.spec
        self.inputs = PolicyInputs(spec.cameras, spec.state_size, spec.uses_text)
        self.runner, self._seed, self._sessions = runner, options.seed, itertools.count()
        self._control = None
        if not options.whole_chunks:
            self._control = ControlConfig(options.execute or 0, options.ensemble).resolve(spec)
        self.metadata: Mapping[str, Any] = _describe(spec, self._control) | {"step": runner.step}

    @classmethod
    def load(cls, workdir: epath.PathLike, options: PolicyOptions) -> JaxPolicy:
        """The newest checkpoint of a run, compiled.

        Raises:
          UsageError: no policy there, or options that do not suit it.
        """
        policy = cls(load_policy(workdir, sharding.make_mesh(), options.dataset, options.sampling), options)
        policy._warm_up()
        return policy

    def new_session(self) -> JaxSession:
        """See `ServedPolicy`."""
        return JaxSession(self.runner, self._control, (self._seed, next(self._sessions)))

    def _warm_up(self) -> None:
        """Compiles, which no client should have to wait for."""
        begin, size = time.monotonic(), self.runner.spec.image_size
        images = {camera: np.zeros((size, size, 3), np.uint8) for camera in self.inputs.cameras}
        try:
            self.new_session().act(images, np.zeros(self.inputs.state_size, np.float32), "warm up")
        except UsageError as error:
            # Such as embeddings of instructions, of which it has those of its data alone.
            logger.info("The first request will have to wait for compilation: %s", error)
        else:
            logger.info("Compiled in %.1f s", time.monotonic() - begin)


class JaxSession:
    """See `como_jax.serving.policy.Session`."""

    def __init__(self, runner: PolicyRunner, control: ControlConfig | None, seeds: tuple[int, int]):
        """Takes the policy, how chunks are carried out, None for leaving it to the client, and where noise begins."""
        self._runner, self._control, self._seeds = runner, control, seeds
        self._controller: Controller | None = None
        self._chunks = 0

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, prompt: str) -> np.ndarray:
        """See `Session`; raises NonFiniteError where the policy gives no numbers."""
        if self._controller is None:
            self._controller = Controller(self._runner.spec, self._control or ControlConfig(), prompt)
        controller = self._controller
        controller.observe(Sight(images, state))
        if self._control is None:
            return self._sample(controller.scene())
        if controller.needs_chunk():
            controller.add_chunk(self._sample(controller.scene()))
        return controller.next_action()[None]

    def reset(self) -> None:
        """See `Session`."""
        self._controller = None

    def _sample(self, scene: Scene) -> np.ndarray:
        chunk = self._runner.sample([scene], [(*self._seeds, self._chunks)])[0]
        self._chunks += 1
        if not np.isfinite(chunk).all():
            raise NonFiniteError("The policy gave an action that is not finite.")
        return chunk


def _describe(spec: PolicySpec, control: ControlConfig | None) -> dict[str, Any]:
    """What clients are told."""
    if control is None and spec.instants > 1:
        logger.warning(
            "The policy sees %d pictures of each camera, %d steps apart; every request counts as one step, so clients "
            "must ask at every step, or serve with --execute.",
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
