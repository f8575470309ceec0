"""Vision transformers of other projects: MAE, timm's ViTs and SigLIP.

MAE (arXiv 2111.06377) is read as its authors and as transformers save it. A file with a decoder makes a run of family
"mae", a file without one a run of an encoder alone. Of timm, every ViT with a class token and pre-norm blocks is read.
It may have been trained on pixels with another normalisation than ImageNet's, which models see here; the difference
goes into the patch embedding. SigLIP (arXiv 2303.15343) becomes the image tower `observation/images` of a policy, which
`--config.init_from` takes into a policy with `encoder.tower=siglip`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from como_jax.errors import RunError
from como_jax.nn.layers import sincos_position_embedding
from como_jax.spec.images import IMAGENET_MEAN, IMAGENET_STD
from como_jax.weights.importing import Flat, Foreign, Options, Skip, grid_of, new_grid, positions, resizing, usual_heads
from como_jax.weights.tables import (
    DeepTable,
    Entry,
    array,
    clip_blocks,
    huggingface_blocks,
    linear,
    norm,
    patch_table,
    single,
    timm_blocks,
)
from como_jax.weights.tensors import CONFIG_NAME, Weights, read_setting

_DECODER = "decoder_embed.weight"
_TIMM_SKIPS = (
    Skip(r"head(_dist)?\.(weight|bias)", "the classifier"),
    Skip(r"pre_logits\.fc\.(weight|bias)", "the layer before the classifier"),
)
_DECODER_POSITIONS = Skip(
    r"(decoder\.)?decoder_pos_embed", "the decoder's fixed sine-cosine positions are computed here"
)
_SIGLIP_PATCHES = "embeddings.patch_embedding"
_SIGLIP_SKIPS = (
    Skip(r"(vision_model\.)?head\..*", "the head that pools"),
    Skip(r"text_model\..*", "the text tower"),
    Skip(r"logit_(scale|bias)", "scale and bias of the contrastive loss"),
    Skip(r".*embeddings\.position_ids", "the numbers from 0 on"),
)


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of a layout's tensors.

    Attributes:
      cls_token, pos_embed, patch_embed, norm: of the encoder.
      blocks, first_fc: of the encoder's stack, and of the first layer of a block's MLP.
      decoder: prefix of the decoder.
      decoder_blocks: of the decoder's stack.
      make_blocks: makes the table of a stack.
    """

    cls_token: str = "cls_token"
    pos_embed: str = "pos_embed"
    patch_embed: str = "patch_embed.proj"
    norm: str = "norm"
    blocks: str = "blocks"
    first_fc: str = "mlp.fc1"
    decoder: str = ""
    decoder_blocks: str = "decoder_blocks"
    make_blocks: Callable[..., DeepTable] = timm_blocks


def huggingface_names(prefix: str, decoder_blocks: str = "") -> Names:
    """The names of MAE in transformers, with the encoder under a prefix."""
    return Names(
        cls_token=f"{prefix}embeddings.cls_token",
        pos_embed=f"{prefix}embeddings.position_embeddings",
        patch_embed=f"{prefix}embeddings.patch_embeddings.projection",
        norm=f"{prefix}layernorm",
        blocks=f"{prefix}encoder.layer",
        first_fc="intermediate.dense",
        decoder="decoder.",
        decoder_blocks=decoder_blocks,
        make_blocks=huggingface_blocks,
    )


def mae_facebook(weights: Weights, options: Options) -> Foreign:
    """The layout of github.com/facebookresearch/mae, with or without a decoder."""
    return _mae(weights, options, Names())


def mae_huggingface(weights: Weights, options: Options) -> Foreign:
    """The layouts of ViTMAEModel and ViTMAEForPreTraining of transformers."""
    prefix = "vit." if any(name.startswith("vit.") for name in weights.files) else ""
    # Newer versions of transformers use the second name.
    old, new = "decoder.decoder_layers", "decoder.decoder_encoder.layer"
    names = huggingface_names(prefix, new if any(name.startswith(new) for name in weights.files) else old)
    return _mae(weights, options, names)


def timm_vit(weights: Weights, options: Options) -> Foreign:
    """The layout of timm's `VisionTransformer` with a class token."""
    if "cls_token" not in weights.files:
        raise RunError(f"{weights.path} has no cls_token, which the encoder here needs; is it a SigLIP?")
    count = weights.shape("pos_embed")[1]
    # Some models have no position for the class token, which is the same as a position of zeros.
    extra = 1 if round(count**0.5) ** 2 != count else 0
    mean, std = _pixels(weights, options)

    def finish(params: Flat) -> Flat:
        params = fold_pixels(params, mean, std)
        if not extra:
            params["encoder/pos_embed"] = np.pad(params["encoder/pos_embed"], ((0, 0), (1, 0), (0, 0)))
        return params

    encoder = encoder_part(weights, options, Names(), extra=extra, antialias=True)
    return dataclasses.replace(encoder, skips=_TIMM_SKIPS, finish=finish)


def siglip(weights: Weights, options: Options) -> Foreign:
    """The layouts of SiglipModel and SiglipVisionModel of transformers."""
    prefix = "vision_model." if f"vision_model.{_SIGLIP_PATCHES}.weight" in weights.files else ""
    width, _, _, patch_size = weights.shape(f"{prefix}{_SIGLIP_PATCHES}.weight")
    depth = weights.depth(f"{prefix}encoder.layers.{{layer}}.mlp.fc1.weight")
    hidden = weights.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight")[0]
    settings = options.settings.get("vision_config") or options.settings
    path = weights.path.parent / CONFIG_NAME
    given = options.num_heads
    if not given and "num_attention_heads" in settings:
        given = read_setting(settings, "num_attention_heads", int, path)
    heads = usual_heads(weights, width, given)
    for name, known in (("hidden_act", "gelu_pytorch_tanh"), ("layer_norm_eps", 1e-6)):
        if settings.get(name, known) != known:
            raise RunError(f"{path}: {name} {settings[name]!r} must be {known}, as in SigLIP.")
    table_name = f"{prefix}embeddings.position_embedding.weight"
    old = grid_of(weights, table_name, extra=0, axis=0)
    new = new_grid(options.image_size, patch_size, old)
    sizes = {"patch_size": patch_size, "width": width, "depth": depth, "num_heads": heads, "mlp_width": hidden}
    place = positions(table_name, (old**2, width), old, new)
    return Foreign(
        family="observation",
        config={"data.image_size": new * patch_size, "encoder.tower": "siglip"}
        | {f"encoder.{name}": value for name, value in sizes.items()},
        table=siglip_table("observation/images", prefix, place, **sizes),
        skips=_SIGLIP_SKIPS,
        resized={} if old == new else {"observation/images/pos_embed": resizing(old, new)},
    )


def siglip_table(
    path: str, prefix: str, place: Entry, *, patch_size: int, width: int, depth: int, num_heads: int, mlp_width: int
) -> DeepTable:
    """The image tower of SigLIP in transformers.

    Args:
      path: of the tower's parameters.
      prefix: of the names of its tensors.
      place: entry of the positions.
      patch_size, width, depth, num_heads, mlp_width: of the tower.
    """
    top = {
        **patch_table("patch_embed", f"{prefix}{_SIGLIP_PATCHES}", width, patch_size),
        "pos_embed": place,
        **norm("norm", f"{prefix}post_layernorm", width),
    }
    blocks = clip_blocks(f"{prefix}encoder.layers.", width, num_heads, mlp_width)
    table = {**single(top), **{name: (entry, depth) for name, entry in blocks.items()}}
    return {f"{path}/{name}": entry for name, entry in table.items()}


def encoder_part(
    weights: Weights, options: Options, names: Names, *, extra: int = 1, antialias: bool = False
) -> Foreign:
    """The ViT at `encoder` of a model.

    Args:
      weights: of the file.
      options: of the import.
      names: of the tensors.
      extra: positions that belong to no patch.
      antialias: how positions are resized.
    """
    kernel = weights.shape(f"{names.patch_embed}.weight")
    width, patch_size = kernel[0], kernel[-1]
    depth = weights.depth(f"{names.blocks}.{{layer}}.{names.first_fc}.weight")
    hidden = weights.shape(f"{names.blocks}.0.{names.first_fc}.weight")[0]
    heads = _heads(weights, options, width, "num_attention_heads", options.num_heads)
    old = grid_of(weights, names.pos_embed, extra)
    new = new_grid(options.image_size, patch_size, old)
    table = {
        **patch_table("encoder/patch_embed", names.patch_embed, width, patch_size),
        "encoder/cls_token": array(names.cls_token, 1, 1, width),
        "encoder/pos_embed": positions(names.pos_embed, (1, extra + old**2, width), old, new, antialias=antialias),
        **norm("encoder/norm", names.norm, width),
    }
    encoder = {"patch_size": patch_size, "width": width, "depth": depth, "num_heads": heads}
    if hidden != 4 * width:
        encoder["mlp_width"] = hidden
    return Foreign(
        family="encoder",
        config={"data.image_size": new * patch_size, **{f"encoder.{name}": value for name, value in encoder.items()}},
        table={**single(table), **names.make_blocks("encoder/blocks", names.blocks, depth, width, heads, hidden)},
        resized={} if old == new else {"encoder/pos_embed": resizing(old, new, antialias=antialias)},
    )


def _mae(weights: Weights, options: Options, names: Names) -> Foreign:
    encoder = encoder_part(weights, options, names)
    if f"{names.decoder}{_DECODER}" not in weights.files:
        return encoder
    width, encoder_width = weights.shape(f"{names.decoder}{_DECODER}")
    depth = weights.depth(f"{names.decoder_blocks}.{{layer}}.{names.first_fc}.weight")
    # The decoders of the paper have heads of 32 numbers.
    heads = _heads(weights, options, width, "decoder_num_attention_heads", options.decoder_heads or width // 32)
    _check_decoder_positions(weights, f"{names.decoder}decoder_pos_embed", width)
    pixels = encoder.config["encoder.patch_size"] ** 2 * 3
    table = {
        **linear("decoder_embed", f"{names.decoder}decoder_embed", encoder_width, width),
        "mask_token": array(f"{names.decoder}mask_token", 1, 1, width),
        **norm("decoder_norm", f"{names.decoder}decoder_norm", width),
        **linear("decoder_pred", f"{names.decoder}decoder_pred", width, pixels),
    }
    decoder = {"decoder_width": width, "decoder_depth": depth, "decoder_heads": heads}
    blocks = names.make_blocks("decoder_blocks", names.decoder_blocks, depth, width, heads, 4 * width)
    return dataclasses.replace(
        encoder,
        family="mae",
        config={**encoder.config, **{f"model.{name}": value for name, value in decoder.items()}},
        table={**encoder.table, **single(table), **blocks},
        skips=(_DECODER_POSITIONS,),
    )


def _heads(weights: Weights, options: Options, width: int, setting: str, wanted: int) -> int:
    """The heads that an option gives, or else config.json, or else the usual ones."""
    given = options.decoder_heads if setting.startswith("decoder") else options.num_heads
    if not given and setting in options.settings:
        wanted = read_setting(options.settings, setting, int, weights.path.parent / CONFIG_NAME)
    return usual_heads(weights, width, wanted)


def _check_decoder_positions(weights: Weights, name: str, width: int) -> None:
    """Raises RunError if the decoder's positions differ from those that `Mae` computes."""
    grid = grid_of(weights, name, extra=1)
    found = weights.take(name, (1, 1 + grid**2, width))[0].astype(np.float32)
    expected = np.concatenate([np.zeros((1, width)), sincos_position_embedding(grid, grid, width)])
    if np.abs(found - expected).max() > 1e-3:
        raise RunError(f"{weights.path}: {name} is not MAE's sine-cosine table, which the decoder here computes.")


def _pixels(weights: Weights, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the pixels that the model was trained on: of the options, config.json or ImageNet."""
    pretrained: Mapping[str, Any] = options.settings.get("pretrained_cfg") or options.settings
    mean = options.pixel_mean or pretrained.get("mean") or IMAGENET_MEAN
    std = options.pixel_std or pretrained.get("std") or IMAGENET_STD
    found = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    if any(value.shape != (3,) for value in found) or found[1].min() <= 0:
        raise RunError(f"{weights.path}: mean {mean} and std {std} of pixels must be three numbers each, std above 0.")
    return found


def fold_pixels(params: Flat, mean: np.ndarray, std: np.ndarray) -> Flat:
    """The same encoder for pixels with ImageNet's normalisation (m, s) in place of another one.

    The encoder saw a pixel p as (p - mean) / std and now gets x = (p - m) / s, so that
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
