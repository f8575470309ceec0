"""Checks that an exported policy acts in PyTorch as the run does in JAX.

Three things are compared, in float32 on the CPU: one evaluation of the network, a sampled action chunk, for which
  PyTorch
is given the random numbers that JAX draws, and the normalisation of actions and states.
Axes: B samples, T instants, C cameras, H steps of a chunk, A action, S state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from ml_collections import ConfigDict
from torch import nn

from como_jax.data.instructions import InstructionReader, read_embeddings
from como_jax.errors import ConversionError
from como_jax.evaluation.rollouts.policy_runner import PolicyRunner
from como_jax.export.pytorch.parity import TOLERANCE, refuse_large, relative_error
from como_jax.nn.model_def import Params
from como_jax.policies import autoregressive as jax_policy
from como_jax.policies.models import build_policy
from como_jax.policies.vla import attention_mask
from como_jax.runtime_torch import autoregressive as torch_policy
from como_jax.runtime_torch.autoregressive import AutoregressivePolicy
from como_jax.runtime_torch.diffusion import DiffusionPolicy
from como_jax.runtime_torch.noise import GivenNoise
from como_jax.runtime_torch.observation import Observation as TorchObservation
from como_jax.runtime_torch.policy import Policy
from como_jax.runtime_torch.vla import LatentVla
from como_jax.spec.exported import PolicyModel
from como_jax.spec.interface import History, PolicySpec
from como_jax.spec.policies import AutoregressiveConfig, DiffusionConfig, DiffusionPolicyConfig, VlaConfig
from como_jax.training import sharding
from como_jax.training.run import Run
from como_jax.types import Observation

CHUNK_TOLERANCE = 1e-3
"""Limit of the largest difference of a sampled action, as a share of the normalised range in the robot's units."""

_CAMERA = (96, 128)
SEEDS = (3, 4)
"""Seeds of the noise of the two samples."""
NETWORK = "network, one evaluation"
"""Name of the result that every policy has."""
_LATENTS = "network, one evaluation, latents"

Results = dict[str, np.ndarray]


class PolicyReference:
    """The outputs of a run for two samples, in float32.

    Attributes:
      robot: name of the robot, whose normalisation is used.
      observation: two observations of noise, as the network gets them.
      evaluated: the results of one evaluation of the network for them.
      histories: two: images of a camera's size, states in the robot's units, and instructions.
      runner: samples chunks in JAX.
      chunks: float32 `[2, H, A]`, sampled for the histories, in the robot's units.
      keys: `[2]`, the random keys of all noise.
    """

    def __init__(self, run: Run, spec: PolicySpec):
        config, rng = _in_float32(run.config), np.random.default_rng(0)
        reader, texts = InstructionReader.make(config.text, run.workdir), _instructions(config, run)
        self.robot, stats = next(iter(spec.robots.items()))
        self.keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed))(np.asarray(SEEDS, np.uint32))
        self.observation = _noise_observation(spec, reader, texts, rng)
        mesh = sharding.make_mesh(devices=jax.devices("cpu")[:1])
        with jax.default_matmul_precision("highest"):
            self.evaluated = evaluate_jax(config, run.params, self.observation, self.keys)
            self.runner = PolicyRunner(build_policy(config), run.params, spec, stats, reader, mesh)
            self.histories = [_history(self.runner.spec, text, rng) for text in texts]
            self.chunks = self.runner.sample(self.histories, [(seed,) for seed in SEEDS])


def check_policy(reference: PolicyReference, policy: Policy) -> dict[str, float]:
    """Returns the largest relative differences between an exported policy and the reference, by what was compared.

    Raises:
      ConversionError: a difference is too large.
    """
    evaluated = evaluate_torch(policy.module, reference.observation, reference.keys)
    found = {name: relative_error(evaluated[name], value) for name, value in reference.evaluated.items()}
    refuse_large(found, TOLERANCE)
    chunks = policy.sample(reference.histories, GivenNoise(draw_noise(policy.config.model, reference.keys)))
    sampled = {"sampled action chunk, camera images": _action_error(policy, chunks, reference.chunks)}
    refuse_large(sampled, CHUNK_TOLERANCE)
    return found | sampled


def check_normalization(spec: PolicySpec, policy: Policy) -> None:
    """Raises ConversionError unless the exported normalisation of every robot is that of the run."""
    for name, stats in spec.robots.items():
        exported = policy.config.interface.robots[name]
        for ours, theirs in ((stats.action, exported.action), (stats.state, exported.state)):
            if (ours and ours.to_json()) != (theirs and theirs.to_json()):
                raise ConversionError(
                    f"The normalisation of robot {name!r} differs between PyTorch and JAX, so nothing was written."
                )


def _action_error(policy: Policy, chunks: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference, as a share of the range of each number of the action."""
    if chunks.shape != reference.shape:
        return float("inf")
    scale, size = policy.config.interface.robots[policy.robot].action, policy.spec.action_size
    largest, smallest = (scale.inverse(np.full(size, end, np.float32)) for end in (1.0, -1.0))
    # A number that never changes has no range.
    span = np.where(largest > smallest, largest - smallest, 1.0)
    return float(np.max(np.abs(chunks - reference) / span))


def _in_float32(config: ConfigDict) -> ConfigDict:
    """The config of the same policy, computing in float32 whatever it was trained in."""
    config = config.copy_and_resolve_references().unlock()
    config.train.dtype = "float32"
    return config


def _instructions(config: ConfigDict, run: Run) -> list[str]:
    """Two instructions that the policy can read."""
    if config.text.tower == "embedding":
        known = [text for text, _ in read_embeddings(run.workdir).items()]
        return [known[0], known[-1]]
    return ["push", "go up"]


def _noise_observation(
    spec: PolicySpec, reader: InstructionReader, texts: list[str], rng: np.random.Generator
) -> Observation:
    """Two observations; the second lacks the state and, if there are several cameras, the last one."""
    images = (2, spec.instants, len(spec.cameras), spec.image_size, spec.image_size, 3)
    has_camera = np.ones((2, len(spec.cameras)), np.float32)
    has_camera[1, 1:][-1:] = 0
    fields: dict[str, Any] = {reader.key: reader(texts)}
    if spec.state_size:
        state = rng.normal(size=(2, spec.instants, spec.state_size)).astype(np.float32)
        fields |= {"state": state, "has_state": np.asarray([1, 0], np.float32)}
    return Observation(rng.integers(0, 256, images, dtype=np.uint8), has_camera, **fields)


def _history(spec: PolicySpec, instruction: str, rng: np.random.Generator) -> History:
    """A history of noise, with states of this robot."""
    frames = rng.integers(0, 256, (spec.instants, len(spec.cameras), *_CAMERA, 3), dtype=np.uint8)
    images = [dict(zip(spec.cameras, instant, strict=True)) for instant in frames]
    return History(images, rng.uniform(-1, 1, (spec.instants, spec.state_size)).astype(np.float32), instruction)


def evaluate_jax(config: ConfigDict, params: Params, observation: Observation, keys: jax.Array) -> Results:
    """The float32 results of one evaluation of a policy's network in JAX, by name.

    Args:
      config: of a policy that computes in float32.
      params: its parameters.
      observation: B observations.
      keys: `[B]` random keys of the noise.
    """
    found = jax.jit(_EVALUATE_JAX[config.family](config))(params, observation, keys)
    return jax.tree.map(np.asarray, found)


def evaluate_torch(module: nn.Module, observation: Observation, keys: jax.Array) -> Results:
    """The same for an exported policy in PyTorch."""
    with torch.inference_mode():
        found = _EVALUATE_TORCH[type(module)](module, to_torch_observation(observation), keys)
    return {name: value.numpy() for name, value in found.items()}


def to_torch_observation(observation: Observation) -> TorchObservation:
    """The same observation in PyTorch."""
    instruction = observation.text if observation.text_embedding is None else observation.text_embedding
    parts = (observation.images, observation.has_camera, instruction, observation.state, observation.has_state)
    return TorchObservation(*(None if part is None else torch.from_numpy(np.array(part)) for part in parts))


# With these settings, one step of DDPM returns the output of the network for pure noise as the sample.
_ONE_STEP: dict[str, Any] = {"kind": "ddpm", "prediction": "sample", "sample_steps": 1, "clip": 0.0, "eta": 0.0}


def _diffusion_jax(config: ConfigDict) -> Any:
    config = config.copy_and_resolve_references()
    config.model.diffusion.update(_ONE_STEP)
    model = build_policy(config)

    def evaluate(params: Params, observation: Observation, keys: jax.Array) -> dict[str, jax.Array]:
        return {NETWORK: model.bind(params).sample_actions(observation, keys)}

    return evaluate


def one_step(config: DiffusionConfig) -> DiffusionConfig:
    """The settings with which sampling is one evaluation of the network."""
    return dataclasses.replace(config, **_ONE_STEP)


def _diffusion_torch(module: DiffusionPolicy, observation: TorchObservation, keys: jax.Array) -> dict[str, Any]:
    config = module.config
    module.config = dataclasses.replace(config, diffusion=one_step(config.diffusion))
    try:
        found = module.sample_actions(observation, GivenNoise(draw_noise(module.config, keys)))
    finally:
        module.config = config
    return {NETWORK: found}


def _autoregressive_jax(config: ConfigDict) -> Any:
    model, policy = build_policy(config), config.model

    def evaluate(params: Params, observation: Observation, keys: jax.Array) -> dict[str, jax.Array]:
        module, (batch, instants) = model.bind(params), observation.images.shape[:2]
        known = jnp.full((batch, instants), policy.generate_latents and policy.latent_dim > 0)
        values = _latents(keys, instants, policy.latent_queries, policy.latent_dim, policy.codebook_size)
        outputs = module(module.observation(observation), jax_policy.KnownLatents(values, known), jnp.ones(batch, bool))
        found = {NETWORK: module.action_head(outputs.actions)}
        return found | ({_LATENTS: outputs.latents} if policy.generate_latents and policy.latent_dim else {})

    return evaluate


def _autoregressive_torch(module: AutoregressivePolicy, observation: TorchObservation, keys: jax.Array) -> dict:
    config, motion = module.config, None
    if config.generate_latents:
        values = _latents(keys, module.instants, config.latent_queries, config.latent_dim, config.codebook_size)
        known = torch.ones((len(keys), module.instants), dtype=torch.bool)
        motion = torch_policy.KnownLatents(_to_torch(values), known)
    outputs = module(module.observation(observation), motion)
    return {NETWORK: module.action_head(outputs.actions)} | ({_LATENTS: outputs.latents} if motion else {})


def _latents(keys: jax.Array, instants: int, queries: int, size: int, codes: int) -> jax.Array:
    """Random latents of a history: `[B, T, Q, L]`, or codes `[B, T, Q]`."""
    shape = (len(keys), instants, queries)
    if codes:
        return jax.random.randint(keys[0], shape, 0, codes)
    return jax.random.normal(keys[0], (*shape, size))


def _vla_jax(config: ConfigDict) -> Any:
    model, policy = build_policy(config), config.model

    def evaluate(params: Params, observation: Observation, keys: jax.Array) -> dict[str, jax.Array]:
        module = model.bind(params)
        features = module.observation(observation)
        tokens, present = features.context()
        seen, length = tokens.shape[1] - features.text.tokens.shape[1], module.action.length
        values = _chunk(keys, policy.action_head, length, policy.action_size, policy.num_bins)
        mask = attention_mask(present, seen, [length], causal_text=policy.causal_text)
        read = jnp.maximum(jnp.cumsum(present, axis=1) - 1, 0)
        positions = jnp.concatenate([read, present.sum(axis=1)[:, None] + jnp.arange(length)], axis=1)
        out, _ = module.decoder(jnp.concatenate([tokens, module.action.inputs(values)], axis=1), positions, mask)
        return {NETWORK: _head_output(module.action.head, out[:, -length:], values)}

    return evaluate


def _vla_torch(module: LatentVla, observation: TorchObservation, keys: jax.Array) -> dict[str, torch.Tensor]:
    config, outputs = module.config, []
    values = _to_torch(_chunk(keys, config.action_head, module.action.length, config.action_size, config.num_bins))

    def choose(token: int, features: torch.Tensor) -> torch.Tensor:
        outputs.append(features)
        return values[:, token]

    module.write(observation, choose)
    return {NETWORK: _head_output(module.action.head, torch.stack(outputs, dim=1), values)}


def _chunk(keys: jax.Array, head: str, length: int, size: int, codes: int) -> jax.Array:
    """Random values of the tokens of an action: `[B, S, L]`, or codes `[B, S]`."""
    if head == "bins":
        return jax.random.randint(keys[0], (len(keys), length), 0, codes)
    return jax.random.normal(keys[0], (len(keys), length, size))


def _head_output(head: Any, features: Any, values: Any) -> Any:
    """The output of a head, of either library; one that denoises estimates the values at time 1/2."""
    if not hasattr(head, "estimate"):
        return head.out(features)
    flat = features.reshape(-1, features.shape[-1])
    noisy = values.reshape(len(flat), -1)
    return head.estimate(noisy, 0 * noisy[:, 0] + 0.5, head.condition_in(flat))


def _to_torch(values: jax.Array) -> torch.Tensor:
    """A PyTorch tensor; codes become int64."""
    found = torch.from_numpy(np.array(values))
    return found if found.is_floating_point() else found.long()


_EVALUATE_JAX = {
    "diffusion_policy": _diffusion_jax,
    "autoregressive_policy": _autoregressive_jax,
    "latent_vla": _vla_jax,
}
_EVALUATE_TORCH: dict[type, Any] = {
    DiffusionPolicy: _diffusion_torch,
    AutoregressivePolicy: _autoregressive_torch,
    LatentVla: _vla_torch,
}


def draw_noise(config: PolicyModel, keys: jax.Array) -> Iterator[np.ndarray]:
    """Yields the random numbers of sampling, so that PyTorch can be given those of JAX.

    A policy draws them from one key per sample; here they are drawn again, in the order in which
    `como_jax.runtime_torch` asks for them. Each array has a leading axis B.

    Args:
      config: of the exported policy.
      keys: `[B]`, the keys that `sample_actions` gets.
    """
    if isinstance(config, DiffusionPolicyConfig):
        yield from _denoising_noise(config.diffusion, keys, keys, (config.chunk, config.action_size))
    elif isinstance(config, AutoregressiveConfig):
        if config.generate_latents:
            yield from _token_noise(config, keys, config.latent_queries, config.latent_dim, config.codebook_size)
    elif config.action_head == "bins":
        yield from _token_noise(config, keys, config.chunk * config.action_size, 0, config.num_bins)
    else:
        yield from _token_noise(config, keys, config.chunk, config.action_size, 0)


def _token_noise(
    config: AutoregressiveConfig | VlaConfig, keys: jax.Array, length: int, size: int, codes: int
) -> Iterator[np.ndarray]:
    """The noise of the heads of `como_jax.policies.heads`, for tokens that are codes or vectors of some size."""
    for token in range(length):
        token_keys = _fold(keys, token)
        if codes and config.temperature:
            # As `jax.random.categorical` draws it.
            yield _each(token_keys, lambda key: jax.random.gumbel(key, (codes,)))
        elif not codes and _head(config) != "regression":
            start, later = jnp.moveaxis(jax.vmap(jax.random.split)(token_keys), 1, 0)
            yield from _denoising_noise(config.head_diffusion, start, later, (size,))


def _head(config: AutoregressiveConfig | VlaConfig) -> str:
    return config.latent_head if isinstance(config, AutoregressiveConfig) else config.action_head


def _denoising_noise(
    config: DiffusionConfig, start: jax.Array, later: jax.Array, shape: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """The noise that `como_jax.policies.denoising.denoise` starts from and adds, from keys for each."""
    yield _normal(start, shape)
    if config.kind == "ddpm" and config.eta:
        for step in range(config.sample_steps):
            yield _normal(_fold(later, step), shape)


def _fold(keys: jax.Array, number: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _normal(keys: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    return _each(keys, lambda key: jax.random.normal(key, shape))


def _each(keys: jax.Array, draw: Callable[[jax.Array], Any]) -> np.ndarray:
    return np.asarray(jax.vmap(draw)(keys))
