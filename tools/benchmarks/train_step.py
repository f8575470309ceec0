"""Times the jitted train step of a recipe on random frames: no decoding, no evaluation, no checkpoints.

python -m tools.benchmarks.train_step --config configs/pretrain_como.py:tiny
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from como_jax import cli
from como_jax.models.build import build_model
from como_jax.training import sharding
from como_jax.training.build import build_training
from como_jax.training.train_state import create_state
from como_jax.types import fake_frame_pairs
from tools.benchmarks.machine import describe_machine

_CONFIG = config_flags.DEFINE_config_file("config", None, "Recipe, as for experiments.pretrain.")
_STEPS = flags.DEFINE_integer("steps", 20, "Steps to time, after three that are not counted.")


def time_steps(config: ConfigDict, num_steps: int) -> tuple[float, list[float]]:
    """Seconds of the first step, which compiles, and of each timed one."""
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size(mesh, config.data.batch_size, config.train.accumulation)
    model = build_model(config)
    optimizer, abstract, step = build_training(config, model, mesh)
    state = create_state(model, optimizer, abstract, seed=config.seed)
    data = config.data
    batch = fake_frame_pairs(
        data.batch_size,
        data.instants,
        data.image_size,
        flow=bool(config.model.get("flow_weight")),
        label_size=config.model.get("label_size") or None,
    )
    batch = sharding.shard_batch(batch, mesh)
    seconds = []
    for _ in range(num_steps + 3):
        begin = time.monotonic()
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.monotonic() - begin)
    return seconds[0], seconds[3:]


def main(arguments: Sequence[str]) -> None:
    """Prints the machine, the shapes and the rate."""
    cli.no_arguments(arguments)
    config = _CONFIG.value
    first, seconds = time_steps(config, _STEPS.value)
    pairs = config.data.batch_size * (config.data.instants - 1)
    rates = sorted(pairs / value for value in seconds)
    print(describe_machine())
    print(
        f"{config.family}: {pairs} pairs a step of {config.data.image_size} px, {config.train.dtype}, remat "
        f"{config.train.remat}, mesh {config.mesh.to_dict()}"
    )
    print(f"first step {first:.1f} s, then pairs/s: {statistics.median(rates):.1f} ({rates[0]:.1f}-{rates[-1]:.1f})")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    cli.run(main)
