"""Moto's latent motion tokenizer (arXiv 2412.04445) and CoMo (arXiv 2505.17006), whose code has the same modules.

Both become a `ReleasedComo`, which computes as that code does. Their files leave out the frozen encoder, MAE ViT-L in
the layout of transformers. It is read from a second file that contains it, or taken from another run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from como_jax.errors import RunError
from como_jax.weights.importing import Constant, Flat, Foreign, Options, Skip, grid_of, usual_heads
from como_jax.weights.tables import (
    DeepTable,
    Entry,
    Table,
    array,
    channels_first,
    huggingface_blocks,
    linear,
    norm,
    patch_table,
    single,
)
from como_jax.weights.tensors import Weights
from como_jax.weights.vit_encoders import encoder_part, huggingface_names

_ENCODER, _FORMER, _DECODER = "image_encoder.", "m_former.", "decoder.transformer."
_DOWN, _UP = "vq_down_resampler", "vq_up_resampler"
_CODEBOOK = "vector_quantizer.embedding.weight"
_UNUSED = "the usage of codes is counted anew"
_SKIPS = (
    Skip(r"loss_fn_lpips\..*", "the network of the perceptual loss"),
    Skip(r"(m_former|decoder\.transformer)\.pooler\..*", "a pooler that nothing reads"),
    Skip(r"hidden_state_decoder\..*", "the decoder of features, a loss term"),
)


def moto(weights: Weights, options: Options) -> Foreign:
    """The layout of Moto's `LatentMotionTokenizer`: the motion is the next frame's features, the latent quantised."""
    codes, latent = weights.shape(_CODEBOOK)
    quantiser = {
        "model.motion_input": "future",
        "model.bottleneck.kind": "vq",
        "model.bottleneck.codebook_size": codes,
        "model.tcl_weight": 0.0,
    }
    table = {"bottleneck/codebook": array(_CODEBOOK, codes, latent)}
    constants = {
        "bottleneck/usage": Constant(np.zeros(codes), _UNUSED),
        "bottleneck/share": Constant(np.full(codes, 1 / codes), _UNUSED),
    }
    return _tokenizer(weights, options, quantiser, table, constants)


def como(weights: Weights, options: Options) -> Foreign:
    """The layout of CoMo's code: the motion is the difference of features, and nothing quantises the latent."""
    if _CODEBOOK in weights.files:
        raise RunError(f"{weights.path} has a codebook, {_CODEBOOK}; is it of the format moto?")
    return _tokenizer(weights, options, {"model.motion_input": "difference"}, {}, {})


def _tokenizer(
    weights: Weights, options: Options, config: dict[str, Any], table: Table, constants: dict[str, Constant]
) -> Foreign:
    idm, idm_table = _inverse_dynamics(weights, options)
    fdm, fdm_table = _forward_dynamics(weights, options)
    if idm["idm_width"] != weights.shape(f"{_DOWN}.0.weight")[0]:
        raise RunError(f"{weights.path}: {_DOWN} must keep the width of m_former, as it does in the released models.")
    encoder = _encoder(weights, options)
    latent = weights.shape(f"{_DOWN}.2.weight")[0]
    width = weights.shape(f"{_FORMER}embeddings.projection.weight")[1]
    found = encoder.config["encoder.width"]
    if found != width:
        raise RunError(f"{weights.path} reads features of width {width}, but the encoder has width {found}.")
    heads = {
        **linear("idm/latent_hidden", f"{_DOWN}.0", idm["idm_width"], idm["idm_width"]),
        **linear("idm/latent_out", f"{_DOWN}.2", idm["idm_width"], latent),
        **linear("latent_hidden", f"{_UP}.0", latent, latent),
        **linear("fdm/latent_up", f"{_UP}.2", latent, fdm["fdm_width"]),
    }
    return Foreign(
        family="como",
        config={
            "released_code": True,
            "data.fit": "stretch",
            **encoder.config,
            "encoder.frozen": True,
            **{f"model.{name}": value for name, value in (idm | fdm | {"latent_dim": latent}).items()},
            # With the term, its network would be a part of the model.
            "model.perceptual_weight": 0.0,
            **config,
        },
        table={**encoder.table, **idm_table, **fdm_table, **single(heads), **single(table)},
        skips=_SKIPS,
        constants={**encoder.constants, **constants},
        finish=_add_first_type,
    )


def _add_first_type(params: Flat) -> Flat:
    """Adds the first token type to the queries and the separator, as that code does."""
    names = ("idm/queries", "idm/separator")
    return params | {name: params[name] + params["idm/condition_type"] for name in names}


def _encoder(weights: Weights, options: Options) -> Foreign:
    """The frozen encoder, from the file or from the run that is given for it."""
    names = huggingface_names(_ENCODER)
    if f"{names.patch_embed}.weight" in weights.files:
        return encoder_part(weights, options, names)
    if not options.encoder:
        raise RunError(f"{weights.path} holds no image_encoder; set `encoder` to a run of MAE ViT-L, which has it.")
    reason = "the encoder of another run"
    return Foreign(
        family="encoder",
        config=options.encoder_config,
        table={},
        constants={path: Constant(value, reason) for path, value in options.encoder.items()},
    )


def _inverse_dynamics(weights: Weights, options: Options) -> tuple[dict[str, int], DeepTable]:
    """The sizes of the motion Q-former and its table."""
    width, features = weights.shape(f"{_FORMER}embeddings.projection.weight")
    queries = weights.shape(f"{_FORMER}embeddings.latent_motion_token")[1]
    count = weights.shape(f"{_FORMER}embeddings.position_embeddings")[1]
    blocks = f"{_FORMER}encoder.layer"
    depth = weights.depth(f"{blocks}.{{layer}}.intermediate.dense.weight")
    heads = usual_heads(weights, width, options.decoder_heads)
    embeddings = f"{_FORMER}embeddings."
    motion_type = 1 if options.separate_types else 0
    table = {
        **linear("idm/input_proj", f"{embeddings}projection", features, width),
        "idm/queries": array(f"{embeddings}latent_motion_token", 1, queries, width),
        "idm/separator": array(f"{embeddings}sep_token", 1, 1, width),
        "idm/condition_type": _type(f"{embeddings}token_type_embeddings", 0, width),
        "idm/motion_type": _type(f"{embeddings}token_type_embeddings", motion_type, width),
        "idm/pos_embed": array(f"{embeddings}position_embeddings", 1, count, width),
        **norm("idm/norm", f"{_FORMER}layernorm", width),
    }
    sizes = {"num_queries": queries, "idm_width": width, "idm_depth": depth, "idm_heads": heads}
    return sizes, {**single(table), **huggingface_blocks("idm/blocks", blocks, depth, width, heads, 4 * width)}


def _forward_dynamics(weights: Weights, options: Options) -> tuple[dict[str, int], DeepTable]:
    """The sizes of the decoder of pixels and its table."""
    embeddings, blocks = f"{_DECODER}embeddings.", f"{_DECODER}encoder.layer"
    width, _, _, patch_size = weights.shape(f"{embeddings}patch_embeddings.projection.weight")
    depth = weights.depth(f"{blocks}.{{layer}}.intermediate.dense.weight")
    heads = usual_heads(weights, width, options.decoder_heads)
    grid = grid_of(weights, f"{embeddings}position_embeddings", extra=0)
    queries = weights.shape(f"{embeddings}query_pooling_layer.weight")[1] // width
    pixels = patch_size**2 * 3
    table = {
        **patch_table("fdm/patch_embed", f"{embeddings}patch_embeddings.projection", width, patch_size),
        "fdm/pos_embed": array(f"{embeddings}position_embeddings", 1, grid**2, width),
        **linear("fdm/latent_pool", f"{embeddings}query_pooling_layer", queries * width, width),
        **norm("fdm/norm", f"{_DECODER}layernorm", width),
        "fdm/head/kernel": _one_by_one("decoder.decoder.0.weight", pixels, width),
        "fdm/head/bias": channels_first("decoder.decoder.0.bias", (pixels,), 0),
    }
    sizes = {"fdm_width": width, "fdm_depth": depth, "fdm_heads": heads, "fdm_patch_size": patch_size}
    return sizes, {**single(table), **huggingface_blocks("fdm/blocks", blocks, depth, width, heads, 4 * width)}


def _type(name: str, number: int, width: int) -> Entry:
    """One of the two token types."""
    return Entry((name,), (2, width), lambda types: types[number].reshape(1, 1, width))


def _one_by_one(name: str, pixels: int, width: int) -> Entry:
    """The kernel of the layer that draws patches, which the file keeps as a convolution of 1 x 1."""
    matrix = channels_first(name, (pixels, width), 0)
    return Entry((name,), (pixels, width, 1, 1), lambda weight: matrix.make(weight[:, :, 0, 0]))
