"""Batches of a config without any data, for compiling or timing a step: their shapes, or random numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from como_jax.motion.models import FAMILIES, batch_parts
from como_jax.training import sharding
from como_jax.types import FramePairs, PolicyBatch, fake_frame_pairs, fake_policy_batch


@dataclasses.dataclass(frozen=True)
class DataSizes:
    """The sizes that a dataset would decide, where a config leaves them open by 0.

    Attributes:
      action_size, state_size: numbers in an action and in a proprioceptive state.
      latent_shape: latent tokens of a transition, and numbers in each; (0, 0) for data without labels.
      codebook_size: of discrete labels; 0 for continuous ones.
      label_size: numbers in the label of a frame pair, where `model.label_weight` reads one.
      embedding_size: of instructions embedded beforehand.
    """

    action_size: int = 7
    state_size: int = 8
    latent_shape: tuple[int, int] = (8, 16)
    codebook_size: int = 0
    label_size: int = 7
    embedding_size: int = 512


def assumed_sizes(config: ConfigDict, sizes: DataSizes) -> dict[str, int]:
    """The sizes that a config leaves open, as `resolve` takes them, where there is no data to decide them."""
    if config.family in FAMILIES:
        assumed = {"model.label_size": sizes.label_size if batch_parts(config).supervision else 0}
    else:
        assumed = {
            "model.action_size": sizes.action_size,
            "model.latent_queries": sizes.latent_shape[0],
            "model.latent_dim": sizes.latent_shape[1],
            "model.codebook_size": sizes.codebook_size,
            "data.state_size": sizes.state_size if config.data.proprioception else 0,
            "text.embedding_size": sizes.embedding_size,
        }

    def is_open(name: str) -> bool:
        section, _, field = name.partition(".")
        return config[section].get(field) == 0

    return {name: size for name, size in assumed.items() if is_open(name)}


def abstract_batch(config: ConfigDict, mesh: Mesh) -> FramePairs | PolicyBatch:
    """A global batch as `jax.ShapeDtypeStruct`s, split over the mesh as `sharding.shard_batch` splits one.

    Args:
      config: after `resolve`.
      mesh: of devices, which need not exist.
    """
    one = random_batch(config, 1)
    split = NamedSharding(mesh, sharding.BATCH_SPEC)

    def of_batch(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.data.batch_size, *x.shape[1:]), x.dtype, sharding=split)

    return jax.tree.map(of_batch, one)


def random_batch(config: ConfigDict, count: int) -> FramePairs | PolicyBatch:
    """Random numbers in the shapes of a batch of clips or of a policy's samples, for a config after `resolve`."""
    return _random_clips(config, count) if config.family in FAMILIES else random_samples(config, count)


def _random_clips(config: ConfigDict, count: int) -> FramePairs:
    data, needs = config.data, batch_parts(config)
    return fake_frame_pairs(
        count,
        data.instants,
        data.image_size,
        offset=needs.offset_frames,
        flow=needs.flow,
        label_size=config.model.label_size if needs.supervision else None,
    )


def random_samples(config: ConfigDict, count: int) -> PolicyBatch:
    """Random samples of a policy: the first half of robots, the second half of videos."""
    data, model, text = config.data, config.model, config.text
    latent_shape = (model.latent_queries, model.latent_dim)
    batch = fake_policy_batch(
        count,
        instants=data.instants,
        stride=data.stride,
        cameras=max(1, len(data.cameras)),
        image_size=data.image_size,
        chunk=data.chunk,
        action_size=model.action_size,
        state_size=data.state_size or None,
        text_length=text.max_length,
        latent_shape=latent_shape if all(latent_shape) else None,
        codebook_size=model.codebook_size or None,
    )
    if text.tower != "embedding":
        return batch
    embedding = np.random.default_rng(1).normal(size=(count, text.embedding_size)).astype(np.float32)
    observation = dataclasses.replace(batch.observation, text=None, text_embedding=embedding)
    return dataclasses.replace(batch, observation=observation)
