"""Sources of the random numbers of sampling: a generator, or numbers that were drawn elsewhere.

Sampling asks for the numbers of a batch in a fixed order, so that they can be given in advance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from como_jax.errors import InputError


class Noise(Protocol):
    """A source of random numbers."""

    def normal(self, *shape: int) -> Tensor:
        """Numbers from N(0, 1), float32, on the CPU."""

    def gumbel(self, *shape: int) -> Tensor:
        """Numbers from the standard Gumbel distribution; the argmax of logits plus these numbers draws a category."""


class DrawnNoise:
    """Numbers from a generator on the CPU, so that all devices get the same ones."""

    def __init__(self, generator: torch.Generator):
        self._generator = generator

    def normal(self, *shape: int) -> Tensor:
        """See `Noise`."""
        return torch.randn(shape, generator=self._generator)

    def gumbel(self, *shape: int) -> Tensor:
        """See `Noise`."""
        uniform = torch.rand(shape, generator=self._generator).clamp(min=torch.finfo(torch.float32).tiny)
        # The logarithm of 1 is 0, whose own logarithm is infinite; the largest float below 1 stands for it.
        return -torch.log(-torch.log(uniform.clamp(max=1 - 2**-24)))


class GivenNoise:
    """Numbers that were drawn before, one array for every request."""

    def __init__(self, parts: Iterable[np.ndarray | Tensor]):
        self._parts = iter(parts)

    def normal(self, *shape: int) -> Tensor:
        """See `Noise`; raises InputError if the next array has another shape, or there is none."""
        part = next(self._parts, None)
        if part is None or tuple(part.shape) != shape:
            found = "there is no more" if part is None else f"the next array is {list(part.shape)}"
            raise InputError(f"noise of shape {list(shape)} is needed, and {found}.")
        return torch.tensor(np.asarray(part), dtype=torch.float32)

    gumbel = normal
