"""What the server asks of a policy, whatever computes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class PolicyInputs:
    """What a policy must be told to act.

    Attributes:
      cameras: names of its pictures.
      state_size: numbers in the proprioceptive state; 0 where it is not used.
      uses_text: whether it reads an instruction.
    """

    cameras: tuple[str, ...]
    state_size: int
    uses_text: bool


class Session(Protocol):
    """The episode of one client: history, action queue and whatever else must not mix with that of another."""

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, prompt: str) -> np.ndarray:
        """Actions from now on, float32 `[n, A]`, in the robot's units.

        Args:
          images: uint8 RGB `[H, W, 3]` of every camera.
          state: float32 `[S]`, in the robot's units; empty where the policy does not use it.
          prompt: the instruction; empty where the policy reads none.

        Raises:
          UsageError: the policy cannot act on this; the client is told why.
        """

    def reset(self) -> None:
        """Begins another episode."""


class ServedPolicy(Protocol):
    """A policy with its weights, which all sessions share.

    Attributes:
      inputs: what it must be told.
      metadata: what clients are told about it as they connect: text, numbers, lists and maps.
    """

    inputs: PolicyInputs
    metadata: Mapping[str, Any]

    def new_session(self) -> Session:
        """For one connection. Sessions are called from one thread, one after the other."""
