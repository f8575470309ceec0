"""From a config to a model definition."""

from __future__ import annotations

import jax.numpy as jnp
from ml_collections import ConfigDict

from como_jax.errors import ConfigError
from como_jax.models.mae import Mae, MaeConfig
from como_jax.models.motion import Como, MotionConfig
from como_jax.models.vit import VitConfig
from como_jax.training.train_state import ModelDef

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_model(config: ConfigDict) -> ModelDef:
    """The model that a pretraining config describes.

    Raises:
      ValueError: a name or size in the config makes no model; the message names it.
    """
    if config.train.dtype not in DTYPES:
        raise ConfigError(f"config.train.dtype {config.train.dtype!r} must be one of {', '.join(DTYPES)}.")
    dtype, remat = DTYPES[config.train.dtype], config.train.remat
    encoder = config.encoder
    vit = VitConfig(config.data.image_size, encoder.patch_size, encoder.width, encoder.depth, encoder.num_heads)
    if config.family == "mae":
        mae = MaeConfig(**config.model)
        return ModelDef.create(lambda rngs: Mae(vit, mae, dtype=dtype, remat=remat, rngs=rngs))
    if config.family == "como":
        motion = MotionConfig(**config.model, freeze_encoder=encoder.frozen)
        frozen = ("encoder",) if encoder.frozen else ()
        return ModelDef.create(lambda rngs: Como(vit, motion, dtype=dtype, remat=remat, rngs=rngs), frozen)
    raise ConfigError(f"config.family {config.family!r} must be one of como, mae.")
