"""Serves an exported policy, computed by PyTorch, on machines without JAX."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from como_jax.errors import ConfigError
from como_jax.runtime_torch.policy import Policy
from como_jax.runtime_torch.session import Session
from como_jax.serving.policy import PolicyInputs, PolicyOptions

logger = logging.getLogger("como_jax.serve")


class TorchPolicy:
    """A `ServedPolicy`."""

    def __init__(self, policy: Policy, options: PolicyOptions):
        described = policy.metadata
        self.inputs = PolicyInputs(policy.spec.cameras, policy.spec.state_size, policy.spec.uses_text)
        self._policy, self._whole_chunks = policy, options.whole_chunks
        horizon = described["chunk"] if options.whole_chunks else 1
        self.metadata: Mapping[str, Any] = {
            "action_horizon": horizon,
            "action_dim": policy.spec.action_size,
            **described,
        }

    @classmethod
    def load(cls, directory: os.PathLike[str], options: PolicyOptions) -> TorchPolicy:
        """Loads what `python -m tools.export_torch` wrote, onto the GPU if there is one.

        Raises:
          UsageError: the folder holds no policy, is damaged, or the policy cannot be served with these options.
        """
        if options.sampling:
            raise ConfigError("`sampling` is for runs: an exported policy samples as the config of its run says.")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        numbers = {"execute": options.execute or 0, "ensemble": options.ensemble, "seed": options.seed}
        policy = Policy.from_pretrained(directory, device=device, robot=options.dataset, **numbers)
        logger.info("Computed by PyTorch on %s", device)
        return cls(policy, options)

    def new_session(self) -> TorchSession:
        """Returns a session of its own for one connection."""
        return TorchSession(self._policy.new_session(), self._whole_chunks)


class TorchSession:
    """A `ServedSession`."""

    def __init__(self, session: Session, whole_chunks: bool):
        self._session, self._whole_chunks = session, whole_chunks

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, prompt: str) -> np.ndarray:
        """See `ServedSession`."""
        observation = {"images": images, "state": state}
        if self._whole_chunks:
            return self._session.plan(observation, prompt)
        return self._session.act(observation, prompt)[None]

    def reset(self) -> None:
        """Begins another episode."""
        self._session.reset()
