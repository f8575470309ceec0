"""From a pretraining config to the definition of its model."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from como_jax.data.clips import num_pairs, pair_spans
from como_jax.errors import ConfigError
from como_jax.motion.como import Como
from como_jax.motion.laq import Laq
from como_jax.motion.mae import Mae
from como_jax.motion.released import ReleasedComo, ReleasedLaq
from como_jax.nn.model_def import ModelDef, compute_options, define
from como_jax.nn.vit import vit_config
from como_jax.spec.motion import BottleneckConfig, LaqConfig, MaeConfig, MotionConfig
from como_jax.types import BatchParts

FAMILIES = ("como", "laq", "mae")


def build_model(config: ConfigDict) -> ModelDef:
    """The model that a pretraining config describes.

    Raises:
      ConfigError: a name or size in the config makes no model; the message names it.
    """
    options = compute_options(config)
    # Weights that other projects' code trained need models that compute as that code does.
    laq_class, como_class = (ReleasedLaq, ReleasedComo) if config.get("released_code") else (Laq, Como)
    if config.family == "laq":
        if config.data.pair_span > 1:
            raise ConfigError("data.pair_span must be 1 for LAQ, which encodes both frames of a pair together.")
        laq = LaqConfig(**config.model)
        return define(laq_class, config.data.image_size, laq, **options)
    if config.family == "mae":
        vit, mae = vit_config(config), MaeConfig(**config.model)
        return define(Mae, vit, mae, **options)
    if config.family == "como":
        vit, motion = vit_config(config), motion_config(config)
        return define(como_class, vit, motion, **options)
    raise ConfigError(f"config.family {config.family!r} must be one of {', '.join(FAMILIES)}.")


def batch_parts(config: ConfigDict) -> BatchParts:
    """The optional parts of a batch that the loss of a pretraining config's model reads."""
    weights = config.model
    return BatchParts(
        offset_frames=bool(weights.get("tcl_weight")),
        flow=bool(weights.get("flow_weight")),
        supervision=bool(weights.get("label_weight")),
    )


def pairs_of_clip(config: ConfigDict) -> int:
    """Pairs that a pretraining config trains on of every clip."""
    return num_pairs(config.data.instants, pair_spans(config.data.pair_span, config.data.min_gap_fraction))


def motion_config(config: ConfigDict) -> MotionConfig:
    """CoMo's part of the config."""
    fields = dict(config.model)
    fields.pop("perceptual_file")
    bottleneck = BottleneckConfig(**fields.pop("bottleneck"))
    spans = pair_spans(config.data.pair_span, config.data.min_gap_fraction)
    if config.model.gap_weight and config.data.min_gap_fraction == 1:
        raise ConfigError("model.gap_weight needs gaps that differ: set data.min_gap_fraction under 1.")
    return MotionConfig(
        **fields, bottleneck=bottleneck, freeze_encoder=config.encoder.frozen, pair_spans=(spans[0], spans[-1])
    )


def codebook_size(config: ConfigDict) -> int:
    """The number of codes of the config's model; 0 if its latent motion is continuous."""
    if config.family == "laq":
        return config.model.codebook_size
    bottleneck = config.model.bottleneck
    if bottleneck.kind == "fsq":
        return math.prod(bottleneck.fsq_levels)
    return bottleneck.codebook_size if bottleneck.kind in ("vq", "vq_ema", "nsvq") else 0
