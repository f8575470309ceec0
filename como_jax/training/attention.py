"""Which implementation computes the attention of a train step.

The step alone uses `config.train.attention`: models as `build_model` and `build_policy` make them take XLA's, so that
a run is evaluated, labelled with and exported on any machine.
"""

from __future__ import annotations

import dataclasses
import logging

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from como_jax.errors import ConfigError
from como_jax.nn.attention import CUDNN_HEAD_SIZES, IMPLEMENTATIONS, FusableAttention
from como_jax.nn.model_def import ModelDef

logger = logging.getLogger(__name__)


def choose_attention(config: ConfigDict, model: ModelDef, mesh: Mesh) -> ModelDef:
    """The model of a config as it is trained on a mesh: with the implementation that `config.train.attention` names.

    Raises:
      ConfigError: there is none of that name, or it does not fit the model, its dtype or the devices.
    """
    implementation, dtype = config.train.attention, config.train.dtype
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(f"config.train.attention {implementation!r} must be one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "xla":
        return model
    platform = mesh.devices.flat[0].platform
    if platform not in ("gpu", "cuda"):
        raise ConfigError(f"config.train.attention 'cudnn' needs a GPU, and training is on {platform}; choose 'xla'.")
    if dtype != "bfloat16":
        raise ConfigError(f"config.train.attention 'cudnn' needs config.train.dtype 'bfloat16', and not {dtype!r}.")
    return with_cudnn(model)


def with_cudnn(model: ModelDef) -> ModelDef:
    """The model, of the same parameters, with cuDNN's attention in all modules whose heads it takes.

    Raises:
      ConfigError: there are none.
    """
    module = nnx.eval_shape(lambda: model.build(nnx.Rngs(0)))
    parts = {path: part for path, part in nnx.iter_modules(module) if isinstance(part, FusableAttention)}
    fused = {path: part for path, part in parts.items() if part.fits_cudnn}
    if not fused:
        sizes = ", ".join(map(str, sorted({part.head_size for part in parts.values()}))) or "none without"
        raise ConfigError(
            "config.train.attention 'cudnn' fits no attention of this model: it takes heads of 8, 16, ... "
            f"{CUDNN_HEAD_SIZES[-1]} numbers without learned biases or shared keys, and this has {sizes}; choose 'xla'."
        )
    for part in fused.values():
        part.implementation = "cudnn"
    logger.info("Attention by cuDNN: %s", ", ".join("/".join(map(str, path)) for path in fused))
    return dataclasses.replace(model, graphdef=nnx.split(module)[0])
