"""The interface between the server and a policy, whichever library computes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class PolicyOptions:
    """How a served policy acts.

    Attributes:
      execute, ensemble: how action chunks are carried out; see `ControlConfig`. Where both are None, the server sends
        whole chunks and the client carries them out.
      dataset: the dataset whose normalisation of actions and states is used; needed by policies of several robots.
      sampling: sampling settings that replace those of the run; see `with_sampling` of the policy runner.
      seed: of the sampling noise.
    """

    execute: int | None = None
    ensemble: float | None = None
    dataset: str = ""
    sampling: Mapping[str, str] = dataclasses.field(default_factory=dict)
    seed: int = 0

    @property
    def whole_chunks(self) -> bool:
        """Whether the client carries out the chunks."""
        return self.execute is None and self.ensemble is None

    def one_by_one(self) -> PolicyOptions:
        """These, but the server carries out half of each chunk where the client would carry out whole ones."""
        return dataclasses.replace(self, execute=0) if self.whole_chunks else self


@dataclasses.dataclass(frozen=True)
class PolicyInputs:
    """What a policy needs to know at every step.

    Attributes:
      cameras: names of its cameras.
      state_size: length of the proprioceptive state; 0 for a policy that uses none.
      uses_text: whether the policy reads an instruction.
    """

    cameras: tuple[str, ...]
    state_size: int
    uses_text: bool


class ServedSession(Protocol):
    """The episode of one client: its own history and action queue."""

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, prompt: str) -> np.ndarray:
        """Returns the next actions, float32 `[n, A]`, in the robot's units.

        Args:
          images: uint8 RGB `[H, W, 3]` of every camera.
          state: float32 `[S]`, in the robot's units; empty for a policy that uses no state.
          prompt: the instruction; empty for a policy that reads none.

        Raises:
          UsageError: the policy cannot act on this; the message goes to the client.
        """

    def reset(self) -> None:
        """Begins another episode."""


class ServedPolicy(Protocol):
    """A policy with its weights, shared by all sessions.

    Attributes:
      inputs: what it needs at every step.
      metadata: what clients are told when they connect: text, numbers, lists and maps.
    """

    inputs: PolicyInputs
    metadata: Mapping[str, Any]

    def new_session(self) -> ServedSession:
        """Returns the session of one connection. All sessions are called from one thread, one after the other."""
