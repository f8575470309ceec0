"""Writes the ViT of a motion model in the layout of transformers, so that `ViTModel` loads it."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from etils import epath
from flax import traverse_util

from como_jax.export.pytorch.contents import save_tensors
from como_jax.export.pytorch.parity import refuse_large, relative_error
from como_jax.files import write_json
from como_jax.runtime_torch.latent_motion import LatentMotion
from como_jax.spec.images import IMAGENET_MEAN, IMAGENET_STD
from como_jax.spec.towers import VitConfig
from como_jax.training.run import Run
from como_jax.weights.motion import hf_vit_table
from como_jax.weights.tables import write_tensors
from como_jax.weights.tensors import CONFIG_NAME, WEIGHTS_NAME


def write_encoder(run: Run, vit: VitConfig, folder: epath.Path, model: LatentMotion) -> dict[str, float]:
    """Writes the folder and, if transformers is installed, compares its features with those of the runtime.

    Returns:
      The largest relative difference, by what was compared.

    Raises:
      ConversionError: the difference is too large.
    """
    params = traverse_util.flatten_dict({"encoder": run.params["encoder"]}, sep="/")
    tensors = write_tensors(hf_vit_table(vit), {path: np.asarray(value) for path, value in params.items()})
    folder.mkdir()
    save_tensors(tensors, folder / WEIGHTS_NAME)
    write_json(folder / CONFIG_NAME, _config(vit))
    write_json(folder / "preprocessor_config.json", _preprocessor(vit))
    if importlib.util.find_spec("transformers") is None:
        return {}
    found = {"encoder, ViTModel of transformers": _difference(folder, vit, model)}
    refuse_large(found)
    return found


def _difference(folder: epath.Path, vit: VitConfig, model: LatentMotion) -> float:
    from transformers import ViTModel

    images = torch.randn(1, vit.image_size, vit.image_size, 3, generator=torch.Generator().manual_seed(0))
    loaded = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    with torch.inference_mode():
        features = loaded(images.movedim(-1, 1)).last_hidden_state
        return relative_error(features.numpy(), model.module.encoder(images).numpy())


def _config(vit: VitConfig) -> dict[str, Any]:
    """The content of config.json, for `ViTConfig` of transformers."""
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "image_size": vit.image_size,
        "patch_size": vit.patch_size,
        "num_channels": 3,
        "hidden_size": vit.width,
        "num_hidden_layers": vit.depth,
        "num_attention_heads": vit.num_heads,
        "intermediate_size": vit.mlp_width or 4 * vit.width,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _preprocessor(vit: VitConfig) -> dict[str, Any]:
    """For `ViTImageProcessor`, which stretches images and resizes them by another filter than training does."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": vit.image_size, "width": vit.image_size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
