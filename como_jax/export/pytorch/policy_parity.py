"""Whether an exported policy acts in PyTorch as the run does in JAX: float32, on the processor, with the same noise.

Axes: B samples, T instants, C cameras, H steps of a chunk, A action, S state.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from como_jax.data.instructions import InstructionReader
from como_jax.data.language import read_embeddings
from como_jax.errors import ConversionError
from como_jax.evaluation.rollouts.policy_runner import PolicyRunner
from como_jax.export.pytorch.evaluations import evaluate_jax, evaluate_torch
from como_jax.export.pytorch.parity import TOLERANCE, refuse_large, relative_error
from como_jax.export.pytorch.policy_noise import draw_noise
from como_jax.policies.build import build_policy
from como_jax.policies.spec import PolicySpec, Scene
from como_jax.runtime_torch import session
from como_jax.runtime_torch.noise import GivenNoise
from como_jax.runtime_torch.policy import Policy
from como_jax.training import sharding
from como_jax.training.run import Run
from como_jax.types import Observation

CHUNK_TOLERANCE = 1e-3
"""Of the largest difference of a sampled action, as a share of the range from -1 to 1 in the robot's units."""

_CAMERA = (96, 128)
SEEDS = (3, 4)
"""Of the noise of the two."""


class PolicyReference:
    """What the run makes of two observations, in float32.

    Attributes:
      robot: whose scales were used.
      observation: noise, as the network gets it.
      evaluated: what one evaluation of the network makes of it.
      scenes: pictures of a camera's size, states in the robot's units, and instructions.
      runner: that asks the run in JAX for chunks of two scenes.
      chunks: float32 `[2, H, A]`, sampled for the scenes, in the robot's units.
      keys: `[2]`, from which all noise follows.
    """

    def __init__(self, run: Run, spec: PolicySpec):
        config, rng = _in_float32(run.config), np.random.default_rng(0)
        reader, texts = InstructionReader.make(config.text, run.workdir), _instructions(config, run)
        self.robot, scales = next(iter(spec.scales.items()))
        self.keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed))(np.asarray(SEEDS, np.uint32))
        self.observation = _noise_observation(spec, reader, texts, rng)
        mesh = sharding.make_mesh(devices=jax.devices("cpu")[:1])
        with jax.default_matmul_precision("highest"):
            self.evaluated = evaluate_jax(config, run.params, self.observation, self.keys)
            self.runner = PolicyRunner(build_policy(config), run.params, spec, scales, reader, mesh)
            self.scenes = [_scene(self.runner.spec, text, rng) for text in texts]
            self.chunks = self.runner.sample(self.scenes, [(seed,) for seed in SEEDS])


def check_policy(reference: PolicyReference, policy: Policy) -> dict[str, float]:
    """The largest relative differences of an exported policy to the reference, by what was compared.

    Raises:
      ConversionError: one is too large.
    """
    evaluated = evaluate_torch(policy.module, reference.observation, reference.keys)
    found = {name: relative_error(evaluated[name], value) for name, value in reference.evaluated.items()}
    refuse_large(found, TOLERANCE)
    scenes = [session.Scene(*scene) for scene in reference.scenes]
    chunks = policy.sample(scenes, GivenNoise(draw_noise(policy.config.model, reference.keys)))
    sampled = {"sampled action chunk, camera pictures": _action_error(policy, chunks, reference.chunks)}
    refuse_large(sampled, CHUNK_TOLERANCE)
    return found | sampled


def check_scales(spec: PolicySpec, policy: Policy) -> None:
    """Raises ConversionError unless the exported scales of all robots map as those of the run do."""
    for name, scales in spec.scales.items():
        exported = policy.config.robots[name]
        for ours, theirs in ((scales.action, exported.action), (scales.state, exported.state)):
            if ours is None or theirs is None:
                same = ours is theirs
            else:
                scaled = np.linspace(-1.5, 1.5, 61, dtype=np.float32)[:, None] * np.ones(ours.size, np.float32)
                values = ours.inverse(scaled)
                same = np.array_equal(theirs.inverse(scaled), values) and np.array_equal(theirs(values), ours(values))
            if not same:
                raise ConversionError(f"The scales of robot {name!r} are other ones in PyTorch; nothing was written.")


def _action_error(policy: Policy, chunks: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference, as a share of the range of each number of an action."""
    if chunks.shape != reference.shape:
        return float("inf")
    scale, size = policy.config.robots[policy.robot].action, policy.action_size
    largest, smallest = (scale.inverse(np.full(size, end, np.float32)) for end in (1.0, -1.0))
    # What never changes has no range.
    span = np.where(largest > smallest, largest - smallest, 1.0)
    return float(np.max(np.abs(chunks - reference) / span))


def _in_float32(config: ConfigDict) -> ConfigDict:
    """The config with another dtype of compute than it may have been trained in."""
    config = config.copy_and_resolve_references().unlock()
    config.train.dtype = "float32"
    return config


def _instructions(config: ConfigDict, run: Run) -> list[str]:
    """Two that the policy can read."""
    if config.text.tower == "embedding":
        known = [text for text, _ in read_embeddings(run.workdir).items()]
        return [known[0], known[-1]]
    return ["push", "go up"]


def _noise_observation(
    spec: PolicySpec, reader: InstructionReader, texts: list[str], rng: np.random.Generator
) -> Observation:
    """Two; the second has no state and, where there are several cameras, not the last one."""
    images = (2, spec.instants, len(spec.cameras), spec.image_size, spec.image_size, 3)
    has_camera = np.ones((2, len(spec.cameras)), np.float32)
    has_camera[1, 1:][-1:] = 0
    fields: dict[str, Any] = {reader.key: reader(texts)}
    if spec.state_size:
        state = rng.normal(size=(2, spec.instants, spec.state_size)).astype(np.float32)
        fields |= {"state": state, "has_state": np.asarray([1, 0], np.float32)}
    return Observation(rng.integers(0, 256, images, dtype=np.uint8), has_camera, **fields)


def _scene(spec: PolicySpec, instruction: str, rng: np.random.Generator) -> Scene:
    """Of noise, with the states of this robot."""
    pictures = rng.integers(0, 256, (spec.instants, len(spec.cameras), *_CAMERA, 3), dtype=np.uint8)
    images = [dict(zip(spec.cameras, instant, strict=True)) for instant in pictures]
    return Scene(images, rng.uniform(-1, 1, (spec.instants, spec.state_size)).astype(np.float32), instruction)
