"""Where the random numbers of sampling come from: a generator, or numbers that were drawn elsewhere.

The numbers of a batch are asked for in a fixed order, so that they can be given in advance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from como_jax.errors import InputError


class Noise(Protocol):
    """Gives random numbers."""

    def normal(self, *shape: int) -> Tensor:
        """Of a normal distribution of mean 0 and deviation 1, float32, on the CPU."""

    def gumbel(self, *shape: int) -> Tensor:
        """Of a standard Gumbel distribution: the index of the largest of logits plus these is a draw of a category."""


class DrawnNoise:
    """Of a generator on the CPU, so that all devices get the same numbers."""

    def __init__(self, generator: torch.Generator):
        self._generator = generator

    def normal(self, *shape: int) -> Tensor:
        """See `Noise`."""
        return torch.randn(shape, generator=self._generator)

    def gumbel(self, *shape: int) -> Tensor:
        """See `Noise`."""
        uniform = torch.rand(shape, generator=self._generator).clamp(min=torch.finfo(torch.float32).tiny)
        # Of 1 the logarithm is 0, of which there is none; the largest number below it is the largest that is drawn.
        return -torch.log(-torch.log(uniform.clamp(max=1 - 2**-24)))


class GivenNoise:
    """Numbers that are there already, one array for each time that some are asked for."""

    def __init__(self, parts: Iterable[np.ndarray | Tensor]):
        self._parts = iter(parts)

    def normal(self, *shape: int) -> Tensor:
        """See `Noise`; raises InputError where the next array is of another shape, or there is none."""
        part = next(self._parts, None)
        if part is None or tuple(part.shape) != shape:
            found = "there is no more" if part is None else f"the next array is {list(part.shape)}"
            raise InputError(f"noise of shape {list(shape)} is needed, and {found}.")
        return torch.tensor(np.asarray(part), dtype=torch.float32)

    gumbel = normal
