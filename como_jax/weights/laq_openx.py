"""LAQ as LAPA's code saves it (`laq_openx.pt`), for `ReleasedLaq`, which computes as that code does.

Only files with four latent actions per pair are read; their kernels are 3 x 3.
"""

from __future__ import annotations

import numpy as np

from como_jax.errors import ConfigError
from como_jax.motion.laq import NUM_NULL_TOKENS
from como_jax.weights.importing import Constant, Foreign, Options, Skip
from como_jax.weights.tables import Entry, Table, array, channels_first, kernel, linear, single, stacked
from como_jax.weights.tensors import Weights

_SKIPS = (
    Skip(r".*\.layers\.\d+\.1\.context_norm\.(gamma|beta)", "the context's norm of attention without a context"),
    Skip(r".*\.layers\.\d+\.1\.null_kv", "the null tokens of attention that uses none"),
)
_NO_BIAS = "LAPA's linear layers of the MLP have no bias"
_UNUSED = "the usage of codes is counted anew"
_PATCHES = "to_patch_emb_first_frame"


def laq_openx(weights: Weights, options: Options) -> Foreign:
    """The layout of `LatentActionQuantization`."""
    width, pixels = weights.shape(f"{_PATCHES}.2.weight")
    codes, latent = weights.shape("vq.codebooks")
    head_size = weights.shape("enc_spatial_transformer.layers.0.1.q_scale")[0]
    heads = weights.shape("enc_spatial_transformer.layers.0.1.to_q.weight")[0] // head_size
    patch_size = round((pixels / 3) ** 0.5)
    image_size = options.image_size or 8 * patch_size
    if image_size != 8 * patch_size:
        raise ConfigError(f"`image_size` must be {8 * patch_size}: LAQ pools 8 x 8 patches into four latent actions.")
    stacks = {"spatial": "enc_spatial_transformer", "temporal": "enc_temporal_transformer"}
    stacks["decoder"] = "dec_spatial_transformer"
    depths = {path: weights.depth(f"{name}.layers.{{layer}}.1.to_q.weight") for path, name in stacks.items()}
    table = single(_top_table(width, patch_size, latent, codes, heads))
    constants = {
        "bottleneck/usage": Constant(np.zeros(codes), _UNUSED),
        "bottleneck/share": Constant(np.full(codes, 1 / codes), _UNUSED),
    }
    hidden = weights.shape("enc_spatial_transformer.layers.0.3.4.weight")[1]
    for path, name in stacks.items():
        block = _block(f"{name}.layers.{{layer}}.", width, (heads, head_size), hidden, cross=path == "decoder")
        table |= stacked(path, block, depths[path])
        for layer, size in (("fc1", 2 * hidden), ("fc2", width)):
            constants[f"{path}/layers/mlp/{layer}/bias"] = Constant(np.zeros((depths[path], size)), _NO_BIAS)
    model = {"patch_size": patch_size, "width": width, "num_heads": heads, "head_size": head_size}
    model |= {f"{path}_depth": depth for path, depth in depths.items()}
    model |= {"latent_dim": latent, "codebook_size": codes}
    return Foreign(
        family="laq",
        config={
            "released_code": True,
            "data.image_size": image_size,
            "data.fit": "stretch",
            **{f"model.{name}": value for name, value in model.items()},
        },
        table=table,
        skips=_SKIPS,
        constants=constants,
    )


def _top_table(width: int, patch_size: int, latent: int, codes: int, heads: int) -> Table:
    """All parameters outside of the stacks."""
    pixels = patch_size**2 * 3
    return {
        "patch_norm/scale": channels_first(f"{_PATCHES}.1.weight", (pixels,), 0),
        "patch_norm/bias": channels_first(f"{_PATCHES}.1.bias", (pixels,), 0),
        "patch_embed/kernel": channels_first(f"{_PATCHES}.2.weight", (width, pixels), 1),
        "patch_embed/bias": array(f"{_PATCHES}.2.bias", width),
        "embed_norm/scale": array(f"{_PATCHES}.3.weight", width),
        "embed_norm/bias": array(f"{_PATCHES}.3.bias", width),
        **linear("position_bias/fc1", "spatial_rel_pos_bias.net.0.0", 2, width),
        **linear("position_bias/fc2", "spatial_rel_pos_bias.net.1.0", width, width),
        **linear("position_bias/out", "spatial_rel_pos_bias.net.2", width, heads),
        **_norm("spatial_norm", "enc_spatial_transformer.norm_out", width),
        **_norm("temporal_norm", "enc_temporal_transformer.norm_out", width),
        **_norm("decoder_norm", "dec_spatial_transformer.norm_out", width),
        **linear("latent_in", "vq.project_in", width, latent),
        **linear("latent_out", "vq.project_out", latent, width),
        **_convolution("pool1", "vq.cnn_encoder.0", latent),
        **_convolution("pool2", "vq.cnn_encoder.2", latent),
        "bottleneck/codebook": array("vq.codebooks", codes, latent),
        "head/kernel": channels_first("to_pixels_first_frame.0.weight", (pixels, width), 0),
        "head/bias": channels_first("to_pixels_first_frame.0.bias", (pixels,), 0),
    }


def _block(layer: str, width: int, heads: tuple[int, int], hidden: int, *, cross: bool) -> Table:
    attention = {
        **_norm("norm1", f"{layer}1.norm", width),
        **_attention("attn", f"{layer}1", width, heads),
    }
    if cross:
        attention |= {
            **_norm("cross_norm", f"{layer}2.norm", width),
            **_norm("context_norm", f"{layer}2.context_norm", width),
            **_attention("cross/attn", f"{layer}2", width, heads),
            "cross/attn/null_kv": _null_tokens(f"{layer}2.null_kv", heads),
        }
    return {
        "peg/kernel": Entry(
            (f"{layer}0.dsconv.weight",),
            (width, 1, 3, 3, 3),
            lambda weight: np.moveaxis(weight[:, 0], 0, -1),
            lambda value: [np.moveaxis(value, -1, 0)[:, None]],
        ),
        "peg/bias": array(f"{layer}0.dsconv.bias", width),
        **attention,
        "norm2/scale": array(f"{layer}3.0.weight", width),
        "norm2/bias": array(f"{layer}3.0.bias", width),
        "mlp/fc1/kernel": kernel(f"{layer}3.1.weight", (width,), (2 * hidden,)),
        "mlp/fc2/kernel": kernel(f"{layer}3.4.weight", (hidden,), (width,)),
    }


def _attention(path: str, name: str, width: int, heads: tuple[int, int]) -> Table:
    return {
        f"{path}/q/kernel": kernel(f"{name}.to_q.weight", (width,), heads),
        f"{path}/kv/kernel": kernel(f"{name}.to_kv.weight", (width,), (2, *heads)),
        f"{path}/proj/kernel": kernel(f"{name}.to_out.weight", heads, (width,)),
        f"{path}/q_scale": array(f"{name}.q_scale", heads[1]),
        f"{path}/k_scale": array(f"{name}.k_scale", heads[1]),
    }


def _norm(path: str, name: str, width: int) -> Table:
    return {f"{path}/scale": array(f"{name}.gamma", width), f"{path}/bias": array(f"{name}.beta", width)}


def _null_tokens(name: str, heads: tuple[int, int]) -> Entry:
    """Null keys and values `[2, n, H, K]`, which alternate in the file's `[H, 2 n, K]`."""
    count = NUM_NULL_TOKENS
    split, shape = (heads[0], count, 2, heads[1]), (heads[0], 2 * count, heads[1])

    def unmake(value: np.ndarray) -> list[np.ndarray]:
        return [value.transpose(2, 1, 0, 3).reshape(shape)]

    return Entry((name,), shape, lambda null: null.reshape(split).transpose(2, 1, 0, 3), unmake)


def _convolution(path: str, name: str, width: int) -> Table:
    return {
        f"{path}/kernel": Entry(
            (f"{name}.weight",),
            (width, width, 3, 3),
            lambda weight: weight.transpose(2, 3, 1, 0),
            lambda value: [value.transpose(3, 2, 0, 1)],
        ),
        f"{path}/bias": array(f"{name}.bias", width),
    }
