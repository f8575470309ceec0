"""Vision transformers of timm (`vit_*`), for `Vit`.

The class token's ViT with pre-norm blocks is understood, whatever it was trained for. What it was trained to see is
not what models see here, where pixels have ImageNet's normalisation: the difference goes into the patch embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from como_jax.errors import RunError
from como_jax.nn.layers import IMAGENET_MEAN, IMAGENET_STD
from como_jax.weights.checkpoints import Weights
from como_jax.weights.importing import Flat, Foreign, Options, Skip
from como_jax.weights.tables import array, norm
from como_jax.weights.vit_tables import (
    grid_of,
    new_grid,
    patch_table,
    positions,
    resizing,
    single,
    timm_blocks,
    usual_heads,
)

_SKIPS = (
    Skip(r"head(_dist)?\.(weight|bias)", "the classifier"),
    Skip(r"pre_logits\.fc\.(weight|bias)", "the layer before the classifier"),
)


def timm_vit(weights: Weights, options: Options) -> Foreign:
    """The layout of timm's `VisionTransformer` with a class token."""
    width, _, _, patch_size = weights.shape("patch_embed.proj.weight")
    if "cls_token" not in weights.files:
        raise RunError(f"{weights.path} has no cls_token, which the encoder here needs; is it a SigLIP?")
    depth = weights.depth("blocks.{layer}.mlp.fc1.weight")
    hidden = weights.shape("blocks.0.mlp.fc1.weight")[0]
    heads = usual_heads(weights, width, options.num_heads)
    count = weights.shape("pos_embed")[1]
    # Some have no position for the class token, which is as good as one of zeros.
    extra = 1 if round(count**0.5) ** 2 != count else 0
    old = grid_of(weights, "pos_embed", extra)
    new = new_grid(options.image_size, patch_size, old)
    table = {
        **patch_table("encoder/patch_embed", "patch_embed.proj", width, patch_size),
        "encoder/cls_token": array("cls_token", 1, 1, width),
        "encoder/pos_embed": positions("pos_embed", (1, count, width), old, new, antialias=True),
        **norm("encoder/norm", "norm", width),
    }
    encoder = {"patch_size": patch_size, "width": width, "depth": depth, "num_heads": heads}
    if hidden != 4 * width:
        encoder["mlp_width"] = hidden
    return Foreign(
        family="encoder",
        config={"data.image_size": new * patch_size, **{f"encoder.{name}": value for name, value in encoder.items()}},
        table={**single(table), **timm_blocks("encoder/blocks", "blocks", depth, width, heads, hidden)},
        skips=_SKIPS,
        resized={} if old == new else {"encoder/pos_embed": resizing(old, new, antialias=True)},
        finish=_finisher(*_pixels(weights, options), extra=extra),
    )


def _pixels(weights: Weights, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the pixels that the file's model was trained on: a flag's, config.json's or ImageNet's."""
    pretrained: Mapping[str, Any] = options.settings.get("pretrained_cfg") or options.settings
    mean = options.pixel_mean or pretrained.get("mean") or IMAGENET_MEAN
    std = options.pixel_std or pretrained.get("std") or IMAGENET_STD
    found = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    if any(value.shape != (3,) for value in found) or found[1].min() <= 0:
        raise RunError(f"{weights.path}: mean {mean} and std {std} of pixels must be three numbers each, std above 0.")
    return found


def _finisher(mean: np.ndarray, std: np.ndarray, *, extra: int) -> Callable[[Flat], Flat]:
    def finish(params: Flat) -> Flat:
        params = fold_pixels(params, mean, std)
        if not extra:
            params["encoder/pos_embed"] = np.pad(params["encoder/pos_embed"], ((0, 0), (1, 0), (0, 0)))
        return params

    return finish


def fold_pixels(params: Flat, mean: np.ndarray, std: np.ndarray) -> Flat:
    """The same encoder for pixels with ImageNet's normalisation instead of another one.

    A pixel p, which was seen as (p - mean) / std, is seen as x = (p - m) / s here, and
    (p - mean) / std = (s x + m - mean) / std.
    """
    scale = np.asarray(IMAGENET_STD) / std
    shift = (np.asarray(IMAGENET_MEAN) - mean) / std
    kernel = params["encoder/patch_embed/kernel"].astype(np.float64)
    by_channel = kernel.reshape(-1, 3, kernel.shape[-1])
    bias = params["encoder/patch_embed/bias"] + np.einsum("c,pcd->d", shift, by_channel)
    return params | {
        "encoder/patch_embed/kernel": (by_channel * scale[:, None]).reshape(kernel.shape).astype(np.float32),
        "encoder/patch_embed/bias": bias.astype(np.float32),
    }
