"""Motion models as `como_jax.runtime_torch` has them: what is exported of a run, and where its parameters lie."""

from __future__ import annotations

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from como_jax.motion.laq import NUM_NULL_TOKENS
from como_jax.motion.models import motion_config
from como_jax.nn.vit import vit_config
from como_jax.spec.exported import ExportedMotion
from como_jax.spec.motion import BottleneckConfig, LaqConfig, MotionConfig
from como_jax.spec.towers import VitConfig
from como_jax.weights.tables import (
    DeepTable,
    Entry,
    Table,
    array,
    huggingface_blocks,
    kernel,
    linear,
    norm,
    patch_table,
    single,
    stacked,
    timm_blocks,
)

NOT_EXPORTED = {
    "perceptual": "network of a loss term",
    "feature_head": "head of a loss term",
    "flow_head": "head of a loss term",
    "gap_head": "head of a loss term",
    "label_head": "head of a loss term",
    "bottleneck/usage": "statistics of the codebook",
    "bottleneck/share": "statistics of the codebook",
    "bottleneck/code_count": "statistics of the codebook",
    "bottleneck/code_sum": "statistics of the codebook",
}
"""Prefixes of the paths of parameters that only training needs, and what these are."""


def describe_motion_model(config: ConfigDict) -> ExportedMotion:
    """The motion model of a run: its family, its settings, and the images that it takes."""
    data = config.data
    if config.family == "laq":
        vit, model = None, LaqConfig(**config.model)
    else:
        vit, model = vit_config(config), motion_config(config)
    return ExportedMotion(config.family, data.image_size, data.fit, float(data.gap_seconds), model, vit)


def motion_table(described: ExportedMotion) -> DeepTable:
    """The table of an exported motion model."""
    if isinstance(described.model, LaqConfig):
        return laq_table(described.model)
    assert described.encoder is not None  # `ExportedMotion` checks this.
    return como_table(described.encoder, described.model)


def como_table(vit: VitConfig, config: MotionConfig) -> DeepTable:
    """CoMo and its variants."""
    width, pixels = config.fdm_width, config.fdm_patch_size**2 * 3
    return {
        **vit_table(vit),
        **_bottleneck(config.bottleneck, config.latent_dim),
        **_inverse_dynamics(vit, config),
        **single(
            {
                **linear("fdm/patch_embed", "fdm.patch_embed", pixels, width),
                "fdm/pos_embed": array("fdm.pos_embed", 1, (vit.image_size // config.fdm_patch_size) ** 2, width),
                **linear("fdm/latent_up", "fdm.latent_up", config.latent_dim, width),
                **linear("fdm/latent_pool", "fdm.latent_pool", config.num_queries * width, width),
                **norm("fdm/norm", "fdm.norm", width),
                **linear("fdm/head", "fdm.head", width, pixels),
            }
        ),
        **timm_blocks("fdm/blocks", "fdm.blocks", config.fdm_depth, width, config.fdm_heads, 4 * width),
    }


def vit_table(config: VitConfig, path: str = "encoder") -> DeepTable:
    """A ViT under the names of timm, except that the patch embedding is a linear layer."""
    name, width = path.replace("/", "."), config.width
    top = {
        **linear(f"{path}/patch_embed", f"{name}.patch_embed", config.patch_size**2 * 3, width),
        **_tokens(path, f"{name}.cls_token", f"{name}.pos_embed", config),
        **norm(f"{path}/norm", f"{name}.norm", width),
    }
    return {**single(top), **timm_blocks(f"{path}/blocks", f"{name}.blocks", *_sizes(config))}


def hf_vit_table(config: VitConfig, path: str = "encoder") -> DeepTable:
    """A ViT as `ViTModel` of transformers, without a pooler."""
    top = {
        **patch_table(f"{path}/patch_embed", "embeddings.patch_embeddings.projection", config.width, config.patch_size),
        **_tokens(path, "embeddings.cls_token", "embeddings.position_embeddings", config),
        **norm(f"{path}/norm", "layernorm", config.width),
    }
    return {**single(top), **huggingface_blocks(f"{path}/blocks", "encoder.layer", *_sizes(config))}


def _sizes(config: VitConfig) -> tuple[int, int, int, int]:
    """Depth, width, number of heads and MLP width of the blocks."""
    return config.depth, config.width, config.num_heads, config.mlp_width or 4 * config.width


def laq_table(config: LaqConfig) -> DeepTable:
    """LAQ."""
    width, latent, pixels = config.width, config.latent_dim, config.patch_size**2 * 3
    top = {
        **norm("patch_norm", "patch_norm", pixels),
        **linear("patch_embed", "patch_embed", pixels, width),
        **norm("embed_norm", "embed_norm", width),
        **linear("position_bias/fc1", "position_bias.fc1", 2, width),
        **linear("position_bias/fc2", "position_bias.fc2", width, width),
        **linear("position_bias/out", "position_bias.out", width, config.num_heads),
        **norm("spatial_norm", "spatial_norm", width),
        **norm("temporal_norm", "temporal_norm", width),
        **linear("latent_in", "latent_in", width, latent),
        **_pool("pool1", latent),
        **_pool("pool2", latent),
        **linear("latent_out", "latent_out", latent, width),
        **norm("decoder_norm", "decoder_norm", width),
        **linear("head", "head", width, pixels),
    }
    cross = {**norm("cross_norm", "cross_norm", width), **_cosine("cross/attn", "cross_attn", config, NUM_NULL_TOKENS)}
    return {
        **single(top),
        **_bottleneck(BottleneckConfig("nsvq", config.codebook_size), latent),
        **stacked("spatial", _named(_video_block(config), "spatial.{layer}."), config.spatial_depth),
        **stacked("temporal", _named(_video_block(config), "temporal.{layer}."), config.temporal_depth),
        **stacked("decoder", _named({**_video_block(config), **cross}, "decoder.{layer}."), config.decoder_depth),
    }


def _inverse_dynamics(vit: VitConfig, config: MotionConfig) -> DeepTable:
    width, num_tokens = config.idm_width, vit.grid**2 + 1
    conditioned = config.motion_input != "future_only"
    read = 2 * num_tokens + 1 if conditioned else num_tokens
    latent = config.latent_dim * (2 if config.bottleneck.kind == "kl" else 1)
    types = ("motion_type", "separator", "condition_type") if conditioned else ("motion_type",)
    top = {
        **linear("idm/input_proj", "idm.input_proj", vit.width, width),
        "idm/queries": array("idm.queries", 1, config.num_queries, width),
        **{f"idm/{name}": array(f"idm.{name}", 1, 1, width) for name in types},
        "idm/pos_embed": array("idm.pos_embed", 1, config.num_queries + read, width),
        **norm("idm/norm", "idm.norm", width),
        **linear("idm/latent_hidden", "idm.latent_hidden", width, width),
        **linear("idm/latent_out", "idm.latent_out", width, latent),
    }
    blocks = timm_blocks("idm/blocks", "idm.blocks", config.idm_depth, width, config.idm_heads, 4 * width)
    return {**single(top), **blocks}


def _bottleneck(config: BottleneckConfig, latent_dim: int) -> DeepTable:
    if config.kind in ("none", "kl", "fsq"):
        return {}
    return single({"bottleneck/codebook": array("bottleneck.codebook", config.codebook_size, latent_dim)})


def _tokens(path: str, cls_token: str, pos_embed: str, config: VitConfig) -> Table:
    return {
        f"{path}/cls_token": array(cls_token, 1, 1, config.width),
        f"{path}/pos_embed": array(pos_embed, 1, config.grid**2 + 1, config.width),
    }


def _video_block(config: LaqConfig) -> Table:
    """A spatial or temporal block of LAQ."""
    width = config.width
    hidden = int(width * 4 * 2 / 3)
    return {
        "peg/kernel": _depthwise("peg.conv.weight", width),
        "peg/bias": array("peg.conv.bias", width),
        **norm("norm1", "norm1", width),
        **_cosine("attn", "attn", config),
        **norm("norm2", "norm2", width),
        **linear("mlp/fc1", "mlp.fc1", width, 2 * hidden),
        **linear("mlp/fc2", "mlp.fc2", hidden, width),
    }


def _cosine(path: str, name: str, config: LaqConfig, num_null: int = 0) -> Table:
    heads, width = (config.num_heads, config.head_size), (config.width,)
    null = {f"{path}/null_kv": _null_tokens(f"{name}.null_kv", num_null, heads)} if num_null else {}
    return {
        f"{path}/q/kernel": kernel(f"{name}.q.weight", width, heads),
        f"{path}/kv/kernel": kernel(f"{name}.kv.weight", width, (2, *heads)),
        f"{path}/proj/kernel": kernel(f"{name}.proj.weight", heads, width),
        f"{path}/q_scale": array(f"{name}.q_scale", config.head_size),
        f"{path}/k_scale": array(f"{name}.k_scale", config.head_size),
        **null,
    }


def _null_tokens(name: str, count: int, heads: tuple[int, int]) -> Entry:
    """Null keys and values `[2, n, H, K]`, of which the file keeps all heads in one row."""
    shape = (2, count, heads[0] * heads[1])
    return Entry((name,), shape, lambda rows: rows.reshape(2, count, *heads), lambda value: [value.reshape(shape)])


def _depthwise(name: str, width: int) -> Entry:
    """The kernel `[3, 3, 3, D]` of a depthwise convolution, which PyTorch keeps as `[D, 1, 3, 3, 3]`."""

    def make(weight: np.ndarray) -> np.ndarray:
        return np.moveaxis(weight[:, 0], 0, -1)

    return Entry((name,), (width, 1, 3, 3, 3), make, lambda value: [np.moveaxis(value, -1, 0)[:, None]])


def _pool(path: str, width: int) -> Table:
    """A convolution `[3, 3, L, L]`, which the runtime computes as a linear layer over the patch that it covers."""
    return {
        f"{path}/kernel": kernel(f"{path}.linear.weight", (3, 3, width), (width,)),
        f"{path}/bias": array(f"{path}.linear.bias", width),
    }


def _named(table: Table, prefix: str) -> Table:
    """A table with a prefix before the names of all tensors."""
    return {
        path: dataclasses.replace(entry, names=tuple(f"{prefix}{name}" for name in entry.names))
        for path, entry in table.items()
    }
