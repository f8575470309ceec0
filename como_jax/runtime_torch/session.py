"""One episode of one robot: its history and its queue of actions, beside weights that all share.

Axes: T instants, H steps of a chunk, A action, S numbers of a state; of pictures H and W are height and width.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from como_jax.runtime_torch.chunks import ActionQueue, ControlConfig
from como_jax.runtime_torch.errors import InputError, NonFiniteError
from como_jax.runtime_torch.noise import DrawnNoise, Noise
from como_jax.spec.images import fit_frames

if TYPE_CHECKING:
    from como_jax.runtime_torch.policy import Policy


_Sight = tuple[dict[str, np.ndarray], np.ndarray]


class Scene(NamedTuple):
    """What a policy is asked about.

    Attributes:
      images: uint8 RGB `[H, W, 3]` by camera, for every instant of the history, the oldest first.
      states: float32 `[T, S]` in the robot's units; of no size for policies without.
      instruction: what to do, in words.
    """

    images: Sequence[Mapping[str, np.ndarray]]
    states: np.ndarray
    instruction: str


class Session:
    """See the module's docstring; `Policy.new_session` makes it."""

    def __init__(self, policy: Policy, control: ControlConfig, seed: int | None):
        """Takes the policy, how chunks are carried out, and the seed of its noise."""
        self._policy, self._control = policy, control
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        config = policy.config
        self._instants, self._stride = config.observation.instants, config.interface.stride
        self.reset()

    def reset(self) -> None:
        """Begins another episode."""
        length = (self._instants - 1) * self._stride + 1
        self._history: collections.deque[_Sight] = collections.deque(maxlen=length)
        self._queue = ActionQueue(self._control)

    def act(self, observation: Mapping[str, Any], instruction: str = "", noise: Noise | None = None) -> np.ndarray:
        """The action to take now, float32 `[A]` in the robot's units.

        Call it once for every control step, also for those whose action is in the queue already: history grows by it.

        Args:
          observation: `images`, uint8 RGB `[H, W, 3]` of any size by camera, and `state`, numbers `[S]` in the robot's
            units, where the policy uses one.
          instruction: what to do, in words.
          noise: for the chunk, if one is due; None for the session's own.

        Raises:
          InputError: the observation or the instruction is not what the policy needs; nothing has changed then.
          NonFiniteError: the policy gave an action that is not finite.
        """
        seen = self._check(observation, instruction)
        if self._queue.is_due:
            self._queue.add(self._sample(seen, instruction, noise))
        else:
            self._history.append(seen)
        return self._queue.next()

    def plan(self, observation: Mapping[str, Any], instruction: str = "", noise: Noise | None = None) -> np.ndarray:
        """A whole chunk of actions from now on, float32 `[H, A]`, for robots that carry it out themselves.

        The queue of `act` knows nothing of it. Otherwise like `act`: every call is a step of the history.
        """
        return self._sample(self._check(observation, instruction), instruction, noise)

    def _sample(self, seen: _Sight, instruction: str, noise: Noise | None) -> np.ndarray:
        """Takes note of what is seen and gives a chunk; where that fails, nothing is noted."""
        before = list(self._history)
        self._history.append(seen)
        try:
            chunk = self._policy.sample([self._scene(instruction)], noise or DrawnNoise(self._generator))[0]
            if not np.isfinite(chunk).all():
                raise NonFiniteError("The policy gave an action that is not finite.")
        except Exception:
            self._history.clear()
            self._history.extend(before)
            raise
        return chunk

    def _check(self, observation: Mapping[str, Any], instruction: str) -> _Sight:
        """The pictures as the model sees them, and the state."""
        if not isinstance(instruction, str):
            raise InputError(f"instruction is {type(instruction).__name__} and must be text.")
        policy, interface = self._policy, self._policy.config.interface
        images = observation.get("images") if isinstance(observation, Mapping) else None
        if not isinstance(images, Mapping):
            raise InputError(f"observation.images must hold the pictures of {', '.join(policy.cameras)} by camera.")
        frames = {}
        for camera in policy.cameras:
            if camera not in images:
                raise InputError(f"observation.images.{camera} is missing; there are {', '.join(images) or 'none'}.")
            picture = np.asarray(images[camera])
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3 or not picture.size:
                raise InputError(
                    f"observation.images.{camera} is {picture.dtype} {list(picture.shape)} and must be uint8 RGB "
                    "[H, W, 3]."
                )
            frames[camera] = fit_frames(picture, policy.config.observation.image_size, interface.fit).copy()
        return frames, self._check_state(observation.get("state"))

    def _check_state(self, state: Any) -> np.ndarray:
        """float32 `[S]`, empty where the policy uses none."""
        size = self._policy.state_size
        if not size:
            return np.zeros(0, np.float32)
        if state is None:
            raise InputError(f"observation.state is missing; it must be {size} numbers.")
        try:
            numbers = np.asarray(state, np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"observation.state must be {size} numbers: {error}.") from error
        if numbers.shape != (size,):
            raise InputError(f"observation.state is {list(numbers.shape)} and must be [{size}].")
        if not np.isfinite(numbers).all():
            raise InputError("observation.state holds numbers that are not finite.")
        return numbers.copy()

    def _scene(self, instruction: str) -> Scene:
        """What the policy is asked about now; the first sight stands for those before the episode."""
        now = len(self._history) - 1
        times = [max(0, now - back * self._stride) for back in reversed(range(self._instants))]
        sights = [self._history[time] for time in times]
        return Scene([frames for frames, _ in sights], np.stack([state for _, state in sights]), instruction)
