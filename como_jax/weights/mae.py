"""Masked autoencoders (MAE, arXiv 2111.06377) as their authors and as transformers save them, for `Mae` and `Vit`.

Files with a decoder make a run of family "mae", files without one a run of an encoder alone.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from como_jax.errors import RunError
from como_jax.nn.layers import sincos_position_embedding
from como_jax.weights.checkpoints import Weights
from como_jax.weights.importing import Foreign, Options, Skip
from como_jax.weights.tables import DeepTable, array, linear, norm, read_setting
from como_jax.weights.vit_tables import (
    grid_of,
    huggingface_blocks,
    new_grid,
    patch_table,
    positions,
    resizing,
    single,
    timm_blocks,
    usual_heads,
)

_DECODER = "decoder_embed.weight"


@dataclasses.dataclass(frozen=True)
class _Names:
    """What a layout calls its tensors, and the functions that make its stacks of blocks.

    Attributes:
      cls_token, pos_embed, patch_embed, norm: of the encoder.
      blocks, first_fc: of the encoder's stack, and of the first layer of a block's MLP.
      decoder: what all of the decoder starts with.
      decoder_blocks: of the decoder's stack.
      huggingface: whether blocks are named as in transformers.
    """

    cls_token: str
    pos_embed: str
    patch_embed: str
    norm: str
    blocks: str
    first_fc: str
    decoder: str
    decoder_blocks: str
    huggingface: bool

    def stack(self, path: str, name: str, depth: int, width: int, num_heads: int, hidden: int) -> DeepTable:
        make = huggingface_blocks if self.huggingface else timm_blocks
        return make(path, name, depth, width, num_heads, hidden)


_FACEBOOK = _Names(
    cls_token="cls_token",
    pos_embed="pos_embed",
    patch_embed="patch_embed.proj",
    norm="norm",
    blocks="blocks",
    first_fc="mlp.fc1",
    decoder="",
    decoder_blocks="decoder_blocks",
    huggingface=False,
)


def mae_facebook(weights: Weights, options: Options) -> Foreign:
    """The layout of github.com/facebookresearch/mae, with or without a decoder."""
    return _mae(weights, options, _FACEBOOK)


def mae_huggingface(weights: Weights, options: Options) -> Foreign:
    """The layouts of ViTMAEModel and ViTMAEForPreTraining of transformers."""
    prefix = "vit." if any(name.startswith("vit.") for name in weights.files) else ""
    # Newer versions of transformers write the second name.
    old, new = "decoder.decoder_layers", "decoder.decoder_encoder.layer"
    names = huggingface_names(prefix, new if any(name.startswith(new) for name in weights.files) else old)
    return _mae(weights, options, names)


def huggingface_names(prefix: str, decoder_blocks: str = "") -> _Names:
    """What transformers calls the tensors of MAE where its encoder lies under a prefix."""
    return _Names(
        cls_token=f"{prefix}embeddings.cls_token",
        pos_embed=f"{prefix}embeddings.position_embeddings",
        patch_embed=f"{prefix}embeddings.patch_embeddings.projection",
        norm=f"{prefix}layernorm",
        blocks=f"{prefix}encoder.layer",
        first_fc="intermediate.dense",
        decoder="decoder.",
        decoder_blocks=decoder_blocks,
        huggingface=True,
    )


def encoder_part(weights: Weights, options: Options, names: _Names) -> Foreign:
    """The encoder alone, at `encoder` of any model that has one."""
    kernel = weights.shape(f"{names.patch_embed}.weight")
    width, patch_size = kernel[0], kernel[-1]
    depth = weights.depth(f"{names.blocks}.{{layer}}.{names.first_fc}.weight")
    hidden = weights.shape(f"{names.blocks}.0.{names.first_fc}.weight")[0]
    heads = _heads(weights, options, width, "num_attention_heads", options.num_heads)
    old = grid_of(weights, names.pos_embed, extra=1)
    new = new_grid(options.image_size, patch_size, old)
    table = {
        **patch_table("encoder/patch_embed", names.patch_embed, width, patch_size),
        "encoder/cls_token": array(names.cls_token, 1, 1, width),
        "encoder/pos_embed": positions(names.pos_embed, (1, 1 + old**2, width), old, new),
        **norm("encoder/norm", names.norm, width),
    }
    encoder = {"patch_size": patch_size, "width": width, "depth": depth, "num_heads": heads}
    if hidden != 4 * width:
        encoder["mlp_width"] = hidden
    return Foreign(
        family="encoder",
        config={"data.image_size": new * patch_size, **{f"encoder.{name}": value for name, value in encoder.items()}},
        table={**single(table), **names.stack("encoder/blocks", names.blocks, depth, width, heads, hidden)},
        resized={} if old == new else {"encoder/pos_embed": resizing(old, new)},
    )


def _mae(weights: Weights, options: Options, names: _Names) -> Foreign:
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
    return dataclasses.replace(
        encoder,
        family="mae",
        config={**encoder.config, **{f"model.{name}": value for name, value in decoder.items()}},
        table={
            **encoder.table,
            **single(table),
            **names.stack("decoder_blocks", names.decoder_blocks, depth, width, heads, 4 * width),
        },
        skips=(Skip(r"(decoder\.)?decoder_pos_embed", "the decoder's fixed sine-cosine positions are computed here"),),
    )


def _heads(weights: Weights, options: Options, width: int, setting: str, wanted: int) -> int:
    """Heads by config.json where it names them and no flag does, or else the usual ones."""
    given = options.decoder_heads if setting.startswith("decoder") else options.num_heads
    if not given and setting in options.settings:
        wanted = read_setting(options.settings, setting, int, weights.path.parent / "config.json")
    return usual_heads(weights, width, wanted)


def _check_decoder_positions(weights: Weights, name: str, width: int) -> None:
    """Raises RunError if the decoder's positions are other than those that `Mae` computes."""
    grid = grid_of(weights, name, extra=1)
    found = weights.take(name, (1, 1 + grid**2, width))[0].astype(np.float32)
    expected = np.concatenate([np.zeros((1, width)), sincos_position_embedding(grid, grid, width)])
    if np.abs(found - expected).max() > 1e-3:
        raise RunError(f"{weights.path}: {name} is not MAE's sine-cosine table, which the decoder here computes.")
