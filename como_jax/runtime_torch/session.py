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
          observation: `images`, uint8 RGB `[H, W, 3]` of any size by camera, and `state`, numbers `[S]` in the robot's
            units, where the policy uses one.
          instruction: what to do, in words.
          noise: for the chunk, if one is due; None for the session's own.

        Raises:
          InputError: the observation or the instruction is not what the policy needs.
          NonFiniteError: the policy gave an action that is not finite.
          In both cases the session is as it was before the call.
        """
        self._observe(observation, instruction)
        if self._controller.needs_chunk():
            self._controller.add_chunk(self._chunk(instruction, noise))
        return self._controller.next_action()

    def plan(self, observation: Mapping[str, Any], instruction: str = "", noise: Noise | None = None) -> np.ndarray:
        """A whole chunk of actions from now on, float32 `[H, A]`, for robots that carry it out themselves.

        The queue of `act` does not change. Otherwise like `act`: every call is a step of the history.
        """
        self._observe(observation, instruction)
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

    def _observe(self, observation: Mapping[str, Any], instruction: str) -> None:
        """Checks what is seen, and keeps it as the model will see it."""
        if not isinstance(instruction, str):
            raise InputError(f"instruction is {type(instruction).__name__} and must be text.")
        spec = self._spec
        images = observation.get("images") if isinstance(observation, Mapping) else None
        if not isinstance(images, Mapping):
            raise InputError(f"observation.images must hold an image of {', '.join(spec.cameras)}, by camera.")
        frames = {}
        for camera in spec.cameras:
            if camera not in images:
                raise InputError(f"observation.images.{camera} is missing; there are {', '.join(images) or 'none'}.")
            image = np.asarray(images[camera])
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
                raise InputError(
                    f"observation.images.{camera} is {image.dtype} {list(image.shape)} and must be uint8 RGB [H, W, 3]."
                )
            # A copy, since drivers of cameras may reuse their memory.
            frames[camera] = fit_frames(image, spec.image_size, spec.fit).copy()
        self._controller.observe(frames, self._check_state(observation.get("state")))

    def _check_state(self, state: Any) -> np.ndarray:
        """float32 `[S]`, empty where the policy uses none."""
        size = self._spec.state_size
        if not size:
            return np.zeros(0, np.float32)
        if state is None:
            raise InputError(f"observation.state is missing; it must be {size} numbers.")
        try:
            numbers = np.array(state, np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"observation.state must be {size} numbers: {error}.") from error
        if numbers.shape != (size,):
            raise InputError(f"observation.state is {list(numbers.shape)} and must be [{size}].")
        if not np.isfinite(numbers).all():
            raise InputError("observation.state holds numbers that are not finite.")
        return numbers
