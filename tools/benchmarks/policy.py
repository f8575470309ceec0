"""Times a policy on random data: train steps, on robot data alone and co-trained, and the sampling of action chunks.

    python -m tools.benchmarks.policy --config configs/policy_diffusion.py:tiny

A co-trained batch is one half robot data and one half labelled video. The policy of robot data alone sees as many
samples per step and has no head for latent motion, as with `--config.data.videos=()`. Steps of both take turns, so that
their ratio is meaningful on a busy machine. The time of a chunk goes from images in memory to actions in memory: it
includes the transfer to the device and back, but not decoding and tokenising. CPU times are those of all threads.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from como_jax import cli
from como_jax.policies.models import build_policy
from como_jax.training import sharding
from como_jax.training.batches import DataSizes, assumed_sizes, random_samples
from como_jax.training.models import resolve
from como_jax.training.train_state import create_state
from como_jax.training.train_step import build_training
from como_jax.types import PolicyBatch
from tools.benchmarks.machine import describe_machine

_NO_LATENTS = {"latent_queries": 0, "latent_dim": 0, "codebook_size": 0}
_THROUGHPUT_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds that repeated calls of one function take.

    Attributes:
      first: time of the first call, which compiles.
      wall, cpu: float64 `[n]`, time of each counted call, and CPU time of all threads in it.
    """

    first: float
    wall: np.ndarray
    cpu: np.ndarray


def with_fake_sizes(config: ConfigDict, *, latents: bool) -> ConfigDict:
    """The config with assumed sizes where it leaves them to the data, and without heads for latents if told so."""
    config = resolve(config, assumed_sizes(config, DataSizes()))
    if not latents:
        config.model.update(_NO_LATENTS)
    return config


def make_batch(config: ConfigDict, batch_size: int) -> PolicyBatch:
    """Random data for a config with all sizes: half robot data and half videos, or robot data alone without latents."""
    batch = random_samples(config, batch_size if config.model.latent_dim else 2 * batch_size)
    # The first half are robots.
    return jax.tree.map(lambda x: x[:batch_size], batch)


def time_in_turn(functions: Sequence[Callable[[], Any]], count: int, warm_up: int) -> list[Timing]:
    """Times functions, which take turns, until their results are ready; the first `warm_up` calls do not count."""
    seconds = np.empty((len(functions), warm_up + count, 2))
    for turn in range(warm_up + count):
        for number, function in enumerate(functions):
            wall, cpu = time.monotonic(), time.process_time()
            jax.block_until_ready(function())
            seconds[number, turn] = time.monotonic() - wall, time.process_time() - cpu
    return [Timing(each[0, 0], *each[warm_up:].T) for each in seconds]


def time_training(config: ConfigDict, num_steps: int) -> list[Timing]:
    """Times train steps of a policy of robot data alone, and of a co-trained one."""
    steps = [_make_step(with_fake_sizes(config, latents=latents)) for latents in (False, True)]
    return time_in_turn(steps, num_steps, warm_up=3)


def _make_step(config: ConfigDict) -> Callable[[], Any]:
    """A function that does one step of a new training at every call."""
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size(mesh, config.data.batch_size, config.train.accumulation)
    model = build_policy(config)
    optimizer, abstract, step = build_training(config, model, mesh)
    state = create_state(model, optimizer, abstract, seed=config.seed)
    batch = sharding.shard_batch(make_batch(config, config.data.batch_size), mesh)

    def advance() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return state, metrics

    return advance


def ways_of_sampling(config: ConfigDict, sample_steps: Sequence[int]) -> dict[str, dict[str, Any]]:
    """The ways of sampling: changes of the config, by their names in the table."""
    if config.family == "autoregressive_policy":
        return {
            "actions at once": {"model.generate_latents": False},
            "latent motion first": {"model.generate_latents": True},
        }
    if config.family == "latent_vla":
        return {f"{config.model.action_head}, token after token": {}}
    diffusion = config.model.diffusion
    # A step of flow takes as long as one of DDPM, so that one row shows it.
    kinds = [*(("ddpm", steps) for steps in sample_steps), ("flow", diffusion.sample_steps)]
    return {
        f"{kind}, steps: {steps}": {
            "model.diffusion.kind": kind,
            "model.diffusion.sample_steps": steps,
            "model.diffusion.train_steps": max(steps, diffusion.train_steps),
        }
        for kind, steps in kinds
    }


def time_sampling(
    config: ConfigDict, sample_steps: Sequence[int], batch_sizes: Sequence[int], calls: int
) -> Iterator[tuple[str, list[Timing]]]:
    """Yields the name of every way of sampling, and the time of a call with each batch size."""
    config = with_fake_sizes(config, latents=True)
    # No way of sampling changes the parameters.
    params = jax.jit(build_policy(config).init)(jax.random.key(config.seed))
    for name, changes in ways_of_sampling(config, sample_steps).items():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        # A median needs fewer of them than the upper end does.
        counts = [calls if batch_size == 1 else -(-calls // 4) for batch_size in batch_sizes]
        yield name, [_time_chunks(changed, params, *each) for each in zip(batch_sizes, counts, strict=True)]


def _time_chunks(config: ConfigDict, params: Any, batch_size: int, calls: int) -> Timing:
    model, observation = build_policy(config), make_batch(config, batch_size).observation

    @jax.jit
    def sample(params: Any, observation: Any, seed: int) -> jax.Array:
        return model.bind(params).sample_actions(observation, jax.random.split(jax.random.key(seed), batch_size))

    return time_in_turn([lambda: np.asarray(sample(params, observation, 0))], calls, warm_up=2)[0]


def describe_training(alone: Timing, both: Timing, batch_size: int) -> list[str]:
    """One line for each kind of training, and one for the ratio of their rates."""
    lines = [
        f"{name}: first step {timing.first:.1f} s, then {1 / np.median(timing.wall):.2f} steps/s, "
        f"{_median_and_range(batch_size / timing.wall)} samples/s, CPU {np.median(timing.cpu):.3f} s a step"
        for name, timing in (("robot data alone", alone), ("co-trained", both))
    ]
    ratios = [_median_and_range(alone.wall / both.wall, 2), _median_and_range(alone.cpu / both.cpu, 2)]
    return [*lines, f"rate of co-training beside robot data alone: {ratios[0]}, by CPU time {ratios[1]}"]


def describe_sampling(name: str, single: Timing, many: Timing) -> str:
    """One row of the table."""
    wall = [1000 * np.quantile(single.wall, share) for share in (0.5, 0.95)]
    rate = _THROUGHPUT_BATCH / np.median(many.wall)
    return f"| {name} | {wall[0]:.1f} | {wall[1]:.1f} | {1000 * np.median(single.cpu):.1f} | {rate:.1f} |"


def _median_and_range(values: np.ndarray, digits: int = 1) -> str:
    return f"{np.median(values):.{digits}f} ({values.min():.{digits}f}-{values.max():.{digits}f})"


def _describe_shapes(config: ConfigDict) -> str:
    config = with_fake_sizes(config, latents=True)
    data, model, encoder = config.data, config.model, config.encoder
    return (
        f"{config.family}: {data.batch_size} samples a step, {data.instants} x {max(1, len(data.cameras))} images of "
        f"{data.image_size} px, chunks of {data.chunk} x {model.action_size}, latent motion {model.latent_queries} x "
        f"{model.latent_dim}, {config.train.dtype}, remat {config.train.remat}, encoder "
        f"{'frozen' if encoder.frozen else 'trained'}, mesh {config.mesh.to_dict()}"
    )


def define_flags() -> None:
    """Defines the flags of the command."""
    config_flags.DEFINE_config_file("config", None, "Recipe, as for experiments.train_policy.")
    flags.DEFINE_integer("steps", 20, "Train steps of each kind to time, after three that are not counted.")
    flags.DEFINE_integer("calls", 40, "Calls of each way of sampling to time, after two that are not counted.")
    flags.DEFINE_list("sample_steps", ["1", "4", "10", "100"], "Of the diffusion policy.")
    flags.mark_flag_as_required("config")


def main(arguments: Sequence[str]) -> None:
    """Prints the machine, the shapes, the rates of training and a table of sampling."""
    cli.no_arguments(arguments)
    config, values = flags.FLAGS.config, flags.FLAGS
    print(describe_machine())
    print(_describe_shapes(config))
    print("\n".join(describe_training(*time_training(config, values.steps), config.data.batch_size)))
    print(f"\n| sampling | chunk, ms | 95 % | CPU, ms | chunks/s, {_THROUGHPUT_BATCH} at once |")
    print("|---|---|---|---|---|")
    steps = [int(steps) for steps in values.sample_steps]
    for name, timings in time_sampling(config, steps, (1, _THROUGHPUT_BATCH), values.calls):
        print(describe_sampling(name, *timings), flush=True)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
