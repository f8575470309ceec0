"""Times the jitted train step of any recipe on random data: no decoding, no evaluation, no checkpoints.

    python -m tools.benchmarks.train_step --config configs/pretrain_como.py:tiny
    python -m tools.benchmarks.train_step --config configs/pretrain_como.py --search_batch --peak_tflops 790
    python -m tools.benchmarks.train_step --config configs/pretrain_como.py --config.train.attention=cudnn

The device is kept busy: the program waits for it at the end of a window of several steps, not after each step. All
steps use one batch, which is on the device from the start. Model FLOPs are those that `como_jax.training.flops` counts.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from como_jax import cli
from como_jax.errors import UsageError
from como_jax.files import check_file_output, write_figures
from como_jax.nn.model_def import ModelDef
from como_jax.training import sharding
from como_jax.training.batches import DataSizes, abstract_batch, assumed_sizes, random_batch
from como_jax.training.flops import train_flops
from como_jax.training.models import Unit, make_model, resolve, unit_of
from como_jax.training.train_state import TrainState, create_state
from como_jax.training.train_step import Training, build_training
from como_jax.types import FramePairs, PolicyBatch
from tools.benchmarks.machine import describe_machine
from tools.benchmarks.memory import peak_resident_bytes

logger = logging.getLogger("como_jax.benchmarks.train_step")

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The step of one recipe with one batch.

    Attributes:
      batch_size: elements, which are clips or observations, of all devices together.
      devices: that they are split over.
      unit: what rates count.
      flops: of the model for one element, forward and backward.
      compile_seconds: from the config to the compiled step.
      step_seconds: mean of each window.
      planned_bytes: that XLA allots to state, batch and temporaries on one device.
      temporary_bytes: of these, activations and gradients at their most.
      peak_bytes: seen; of one device's memory, or where it keeps no count, of the process.
      peak_of: "device" or "process", which includes the compiler.
    """

    batch_size: int
    devices: int
    unit: Unit
    flops: float
    compile_seconds: float
    step_seconds: tuple[float, ...]
    planned_bytes: int
    temporary_bytes: int
    peak_bytes: int
    peak_of: str

    @property
    def rates(self) -> list[float]:
        """Units per second, for every window."""
        return [self.batch_size * self.unit.per_element / seconds for seconds in self.step_seconds]

    @property
    def flops_rate(self) -> float:
        """Model FLOP/s of one device, at the median rate."""
        return self.flops * self.batch_size / statistics.median(self.step_seconds) / self.devices

    def to_json(self, peak_tflops: float | None = None) -> dict[str, Any]:
        """Plain numbers, including those that follow from others."""
        return dataclasses.asdict(self) | {
            "unit": self.unit._asdict(),
            "rates": self.rates,
            "median_rate": statistics.median(self.rates),
            "tflops_per_second": self.flops_rate / 1e12,
            "mfu": None if peak_tflops is None else self.flops_rate / 1e12 / peak_tflops,
        }

    def describe(self, peak_tflops: float | None = None) -> str:
        """Two lines for a terminal."""
        rates, name = self.rates, self.unit.name
        mfu = "" if peak_tflops is None else f", MFU {self.flops_rate / 1e12 / peak_tflops:.1%} of {peak_tflops:g}"
        return (
            f"batch {self.batch_size}: {statistics.median(rates):.4g} {name}/s ({min(rates):.4g}-{max(rates):.4g}), "
            f"step {statistics.median(self.step_seconds):.4g} s, model {self.flops_rate / 1e12:.4g} TFLOP/s a device"
            f"{mfu}; compiled in {self.compile_seconds:.1f} s\n"
            f"  memory: peak of the {self.peak_of} {self.peak_bytes / _GIB:.3g} GiB; allotted by XLA "
            f"{self.planned_bytes / _GIB:.3g}, of which temporaries {self.temporary_bytes / _GIB:.3g}"
        )


class Prepared(NamedTuple):
    """A compiled step and its arguments."""

    compiled: jax.stages.Compiled
    state: TrainState
    batch: FramePairs | PolicyBatch
    devices: int
    compile_seconds: float


def with_all_sizes(config: ConfigDict) -> ConfigDict:
    """The config with assumed sizes where it leaves them to data or public weights."""
    return resolve(config, assumed_sizes(config, DataSizes()))


def prepare(config: ConfigDict) -> Prepared:
    """Compiles the step of a config with all sizes, on the mesh that it asks for, with a fresh state."""
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size(mesh, config.data.batch_size, config.train.accumulation)
    begin = time.monotonic()
    model, training = _training(config, mesh)
    compiled = training.step.lower(training.abstract, abstract_batch(config, mesh)).compile()
    seconds = time.monotonic() - begin
    state = create_state(model, training.optimizer, training.abstract, seed=config.seed)
    return Prepared(
        compiled, state, sharding.shard_batch(random_batch(config, config.data.batch_size), mesh), mesh.size, seconds
    )


def _training(config: ConfigDict, mesh: Mesh) -> tuple[ModelDef, Training]:
    model = make_model(config)
    return model, build_training(config, model, mesh)


def measure(config: ConfigDict, windows: int, steps: int, warm_up: int) -> Measurement:
    """Times the step of a config with all sizes.

    Args:
      config: of a recipe.
      windows: that are timed.
      steps: of a window.
      warm_up: steps before, which are not timed.
    """
    flops = train_flops(config)
    prepared = prepare(config)
    planned: Any = prepared.compiled.memory_analysis()
    seconds = time_windows(prepared.compiled, prepared.state, prepared.batch, windows, steps, warm_up)
    peak_bytes, peak_of = _peak_memory()
    in_use = planned.argument_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
    return Measurement(
        batch_size=config.data.batch_size,
        devices=prepared.devices,
        unit=unit_of(config),
        flops=flops,
        compile_seconds=prepared.compile_seconds,
        step_seconds=seconds,
        planned_bytes=in_use + planned.temp_size_in_bytes,
        temporary_bytes=planned.temp_size_in_bytes,
        peak_bytes=peak_bytes,
        peak_of=peak_of,
    )


def time_windows(
    step: Callable[[Any, Any], tuple[Any, Any]], state: Any, batch: Any, windows: int, steps: int, warm_up: int
) -> tuple[float, ...]:
    """Mean seconds of a step, for each window."""

    def run(state: Any, count: int) -> Any:
        for _ in range(count):
            state, _ = step(state, batch)
        return jax.block_until_ready(state)

    state, seconds = run(state, warm_up), []
    for _ in range(windows):
        begin = time.perf_counter()
        state = run(state, steps)
        seconds.append((time.perf_counter() - begin) / steps)
    return tuple(seconds)


def _peak_memory() -> tuple[int, str]:
    """The most bytes that one device has used, or the process where the device does not count them."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if all("peak_bytes_in_use" in found for found in stats):
        return max(found["peak_bytes_in_use"] for found in stats), "device"
    return peak_resident_bytes(), "process"


def search_batch(measure_batch: Callable[[int], Measurement], first: int) -> list[Measurement]:
    """Measures doubled batches until memory is full, and returns all, of which the last is the largest that fits.

    Raises:
      UsageError: the first does not fit.
    """
    found: list[Measurement] = []
    batch_size = first
    while True:
        try:
            found.append(measure_batch(batch_size))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            logger.info("batch %d does not fit", batch_size)
            break
        logger.info("%s", found[-1].describe())
        batch_size *= 2
    if not found:
        raise UsageError(f"--config.data.batch_size={first} does not fit in memory; start the search with fewer.")
    return found


def describe_flops(config: ConfigDict) -> str:
    """One line on the model's FLOPs."""
    unit = unit_of(config)
    return f"model GFLOP a {unit.name.removesuffix('s')}: {train_flops(config) / unit.per_element / 1e9:.4g}"


def describe_shapes(config: ConfigDict) -> str:
    """One line on what is timed."""
    data, encoder = config.data, config.get("encoder", {})
    frozen = "" if not encoder else f", encoder {'frozen' if encoder.get('frozen') else 'trained'}"
    return (
        f"{config.family}: {data.instants} images of {data.image_size} px an element, {config.train.dtype}, remat "
        f"{config.train.remat}, attention by {config.train.attention}, accumulation {config.train.accumulation}"
        f"{frozen}, mesh {config.mesh.to_dict()}"
    )


def define_flags() -> None:
    """Defines the flags of the command."""
    config_flags.DEFINE_config_file("config", None, "Recipe, as for experiments.pretrain or experiments.train_policy.")
    flags.DEFINE_integer("windows", 5, "Windows to time.", lower_bound=1)
    flags.DEFINE_integer("steps", 4, "Steps of a window.", lower_bound=1)
    flags.DEFINE_integer("warm_up", 3, "Steps before, which are not timed.", lower_bound=1)
    flags.DEFINE_float("peak_tflops", None, "Of one device, in the recipe's dtype; gives MFU.", lower_bound=0.0)
    flags.DEFINE_bool("search_batch", False, "Double the batch, from the recipe's on, until memory is full.")
    flags.DEFINE_string("json", None, "File that gets the figures.")
    flags.mark_flag_as_required("config")


def measure_all(config: ConfigDict, given: flags.FlagValues) -> list[Measurement]:
    """Does the measurements that the flags ask for, for a config with all sizes."""

    def measure_batch(batch_size: int) -> Measurement:
        sized = config.copy_and_resolve_references()
        sized.data.batch_size = batch_size
        return measure(sized, given.windows, given.steps, given.warm_up)

    if not given.search_batch:
        return [measure_batch(config.data.batch_size)]
    if jax.default_backend() == "cpu":
        raise UsageError("--search_batch needs a GPU or TPU: a full host ends the process instead of saying so.")
    return search_batch(measure_batch, config.data.batch_size)


def main(arguments: Sequence[str]) -> None:
    """Prints the machine, the shapes, FLOPs, rates and memory."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    config, peak = with_all_sizes(given.config), given.peak_tflops
    if given.json:
        # Before hours of measuring, not after.
        check_file_output(given.json)
    print(f"{describe_machine()}\n{describe_shapes(config)}", flush=True)
    found = measure_all(config, given)
    print(describe_flops(config))
    print(f"medians (range) of {given.windows} windows of {given.steps} steps; the device is waited for between them")
    for measurement in found:
        print(measurement.describe(peak))
    best = max(found, key=lambda measurement: statistics.median(measurement.rates))
    if given.search_batch:
        print(f"best batch: {best.batch_size}")
    if given.json:
        content = {
            "machine": describe_machine(),
            "config": config.to_dict(),
            "flops": train_flops(config),
            "measurements": [measurement.to_json(peak) for measurement in found],
            "best_batch_size": best.batch_size,
        }
        write_figures(given.json, content)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
