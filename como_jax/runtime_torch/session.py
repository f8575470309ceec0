"""One episode of one robot: its history and its queue of actions, beside weights that all sessions share.

Axes: H steps of a chunk, A numbers of an action, S numbers of a state; H and W are height and width of images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from como_jax.errors import InputError, NonFiniteError
from como_jax.runtime_torch.noise import DrawnNoise, Noise
from como_jax.spec.control import ControlConfig, Controller
from como_jax.spec.images import fit_frames
from como_jax.spec.interface import History, PolicySpec
from como_jax.spec.observations import check_image, check_instruction, check_state

Sample = Callable[[Sequence[History], Noise], np.ndarray]


class Session:
    """See the module's docstring; `Policy.new_session` makes it."""

    def __init__(self, spec: PolicySpec, control: ControlConfig, sample: Sample, seed: int | None):
        """Starts the first episode.

        Args:
          spec: of the policy, with the sizes of this robot.
          control: how chunks are carried out.
          sample: gives action chunks `[B, H, A]` for B histories.
          seed: of the noise; None for another one each time.
        """
        self._spec, self._control, self._sample = spec, control, sample
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        self.reset()

    def reset(self) -> None:
        """Begins another episode."""
        self._controller = Controller(self._spec, self._control)

    def act(self, observation: Mapping[str, Any], instruction: str = "", noise: Noise | None = None) -> np.ndarray:
        """The action to take now, float32 `[A]` in the robot's units.

        Call it at every control step, also at those whose action is in the queue already: the history grows by it.

        Args:
          observation: `images`, uint8 RGB `[H, W, 3]` or `[3, H, W]` of any size by camera, and `state`, numbers or
            truth values `[S]` in the robot's units, where the policy uses one.
          instruction: what to do, in words; text, or bytes in UTF-8; may be empty.
          noise: for the chunk, if one is due; None for the session's own.

        Raises:
          InputError: the observation or the instruction is not what the policy needs.
          NonFiniteError: the policy gave an action that is not finite.
          In both cases the session is as it was before the call.
        """
        instruction = self._observe(observation, instruction)
        if self._controller.needs_chunk():
            self._controller.add_chunk(self._chunk(instruction, noise))
        return self._controller.next_action()

    def plan(self, observation: Mapping[str, Any], instruction: str = "", noise: Noise | None = None) -> np.ndarray:
        """A whole chunk of actions from now on, float32 `[H, A]`, for robots that carry it out themselves.

        The queue of `act` does not change. Otherwise like `act`: every call is a step of the history.
        """
        instruction = self._observe(observation, instruction)
        return self._chunk(instruction, noise)

    def _chunk(self, instruction: str, noise: Noise | None) -> np.ndarray:
        """The policy's answer to the history; where that fails, the last observation is forgotten."""
        try:
            history = self._controller.history(instruction)
            chunk = self._sample([history], noise or DrawnNoise(self._generator))[0]
            if not np.isfinite(chunk).all():
                raise NonFiniteError("The policy gave an action that is not finite.")
        except Exception:
            self._controller.forget()
            raise
        return chunk

    def _observe(self, observation: Mapping[str, Any], instruction: Any) -> str:
        """Checks what is seen, and keeps it as the model will see it; returns the instruction as text."""
        text, spec = check_instruction("instruction", instruction), self._spec
        images = observation.get("images") if isinstance(observation, Mapping) else None
        if not isinstance(images, Mapping):
            raise InputError(f"observation.images must hold an image of {', '.join(spec.cameras)}, by camera.")
        frames = {}
        for camera in spec.cameras:
            if camera not in images:
                raise InputError(f"observation.images.{camera} is missing; there are {', '.join(images) or 'none'}.")
            image = check_image(f"observation.images.{camera}", images[camera])
            # A copy, since drivers of cameras may reuse their memory.
            frames[camera] = fit_frames(image, spec.image_size, spec.fit).copy()
        self._controller.observe(frames, self._check_state(observation.get("state")))
        return text

    def _check_state(self, state: Any) -> np.ndarray:
        """float32 `[S]`, empty where the policy uses none."""
        size = self._spec.state_size
        if not size:
            return np.zeros(0, np.float32)
        if state is None:
            raise InputError(f"observation.state is missing; it must be {size} numbers.")
        return check_state("observation.state", state, size)
