"""From a config and a slice to the compiled train step: the same one that a run on that slice would compile."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from como_jax.tpu.topology import Topology
from como_jax.training import sharding
from como_jax.training.batches import DataSizes, abstract_batch, assumed_sizes
from como_jax.training.models import make_model, resolve
from como_jax.training.train_state import TrainState
from como_jax.training.train_step import build_training


class DoesNotFitError(RuntimeError):
    """The step needs more memory than a chip has; the message is the compiler's."""


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A train step for devices that need not exist.

    Attributes:
      config: with all sizes.
      mesh: of the devices of the slice.
      state: shapes and shardings of the train state.
      compiled: the program.
      seconds: time that compiling took.
    """

    config: ConfigDict
    mesh: Mesh
    state: TrainState
    compiled: jax.stages.Compiled
    seconds: float


def compile_step(config: ConfigDict, topology: Topology, sizes: DataSizes) -> CompiledStep:
    """Compiles the train step of a pretraining or policy recipe, with the mesh that the config asks for.

    Args:
      config: of a recipe.
      topology: the slice to compile for.
      sizes: what a dataset would decide.

    Raises:
      UsageError: the config does not fit the slice.
      DoesNotFitError: the step needs more memory than there is.
    """
    config = resolve(config, assumed_sizes(config, sizes))
    mesh = sharding.make_mesh(**config.mesh, devices=topology.devices)
    sharding.check_batch_size(mesh, config.data.batch_size, config.train.accumulation)
    training = build_training(config, make_model(config), mesh)
    begin = time.monotonic()
    lowered = training.step.lower(training.abstract, abstract_batch(config, mesh))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(str(error).splitlines()[0]) from error
    return CompiledStep(config, mesh, training.abstract, compiled, time.monotonic() - begin)


def with_batch_per_chip(config: ConfigDict, per_chip: int, num_chips: int) -> ConfigDict:
    """Returns the config with another batch size."""
    config = config.copy_and_resolve_references()
    config.data.batch_size = per_chip * num_chips
    return config


def largest(fits: Callable[[int], bool], first: int, precision: int = 8) -> int:
    """Finds the largest number that fits, up to an error of one part in `precision`; 0 if not even 1 fits.

    Args:
      fits: true up to some number and false for all larger ones.
      first: the number to try first; from there the search doubles or halves, and then bisects.
      precision: the search ends when no number can be better by more than 1 / `precision`.
    """
    low, high = 0, max(1, first)
    while fits(high):
        low, high = high, 2 * high
    while not low and high > 1:
        half = high // 2
        low, high = (half, high) if fits(half) else (0, half)
    while low and high - low > max(1, low // precision):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
