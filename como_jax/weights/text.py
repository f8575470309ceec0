"""Public text towers, CLIP's and T5's, with weights that a user brings as Hugging Face saves them.

`text_config_of` reads the sizes of a tower from config.json, `load_text_tower` the parameters of `ClipTextTower` or
`T5Tower` from safetensors. Files with more than the tower, such as all of CLIP or T5 with its decoder, work as well.
`clip_text` and `t5_encoder` are the formats of the importer, which makes safetensors of PyTorch's own files.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from etils import epath
from flax import traverse_util

from como_jax.errors import ConfigError, RunError
from como_jax.spec.towers import ACTIVATIONS, GATED, TextConfig
from como_jax.weights.importing import Foreign, Options, Skip
from como_jax.weights.tables import Table, array, clip_blocks, kernel, make_parameter, norm, qkv_kernel, single
from como_jax.weights.tensors import CONFIG_NAME, Tensors, Weights, read_json, read_setting

# The names of the fields of `TextConfig` in config.json, and their values in a file that leaves them out.
_CLIP_FIELDS: dict[str, tuple[str, Any]] = {
    "width": ("hidden_size", 512),
    "depth": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 8),
    "mlp_width": ("intermediate_size", 2048),
    "vocabulary_size": ("vocab_size", 49408),
    "positions": ("max_position_embeddings", 77),
    "activation": ("hidden_act", "quick_gelu"),
    "norm_epsilon": ("layer_norm_eps", 1e-5),
}
_T5_FIELDS: dict[str, tuple[str, Any]] = {
    "width": ("d_model", 512),
    "depth": ("num_layers", 6),
    "num_heads": ("num_heads", 8),
    "head_size": ("d_kv", 64),
    "mlp_width": ("d_ff", 2048),
    "vocabulary_size": ("vocab_size", 32128),
    "relative_buckets": ("relative_attention_num_buckets", 32),
    "relative_distance": ("relative_attention_max_distance", 128),
    "activation": ("feed_forward_proj", "relu"),
    "norm_epsilon": ("layer_norm_epsilon", 1e-6),
}
_TOWER_OF = {"clip": "clip", "clip_text_model": "clip", "t5": "t5", "mt5": "t5"}

T5_TOKENS = ("shared.weight", "encoder.embed_tokens.weight")
"""Names of the token table of T5, which files hold once or twice."""

_CLIP_SKIPS = (
    Skip(r"vision_model\..*|visual_projection\.weight", "the image tower"),
    Skip(r"text_projection\.weight|logit_scale", "what compares text with images"),
    Skip(r".*embeddings\.position_ids", "the numbers from 0 on"),
)
_T5_SKIPS = (
    Skip(r"decoder\..*|lm_head\.weight", "the decoder"),
    Skip("|".join(name.replace(".", r"\.") for name in T5_TOKENS), "the table of tokens once more"),
)


def text_config_of(weights_path: epath.PathLike, base: TextConfig) -> TextConfig:
    """A config with the sizes of some weights, from the config.json beside them.

    Args:
      weights_path: of the .safetensors file, or of the .safetensors.index.json of several.
      base: the wanted kind of tower, and everything that weights do not say.

    Raises:
      RunError: there is no config.json, or it describes no text tower.
      ConfigError: no weights are named, or they belong to another kind of tower.
    """
    if not os.fspath(weights_path):
        raise ConfigError(
            f"text.tower={base.tower} needs text.weights, a .safetensors file with {CONFIG_NAME} beside it."
        )
    tower, fields = _read_config(epath.Path(weights_path))
    if tower != base.tower:
        raise ConfigError(
            f"{weights_path} holds weights of the text tower {tower!r}, but text.tower is {base.tower!r}."
        )
    return dataclasses.replace(base, **fields)


def load_text_tower(weights_path: epath.PathLike) -> dict[str, Any]:
    """Reads the parameters of a text tower as nested float32 arrays.

    Args:
      weights_path: of the .safetensors file, or of the .safetensors.index.json of several, beside config.json.

    Raises:
      RunError: a file is missing or damaged, or a tensor is missing, unknown or of another shape.
    """
    path = epath.Path(weights_path)
    tower, fields = _read_config(path)
    config, tensors = TextConfig(tower=tower, **fields), Tensors(path)
    if tower == "clip":
        prefix = _clip_prefix(tensors)
        table, layers = clip_table(config, prefix), f"{prefix}encoder.layers."
    else:
        table, layers = t5_table(config, _t5_tokens(tensors)), "encoder.block."
    flat = {tuple(name.split("/")): make_parameter(entry, config.depth, tensors) for name, entry in table.items()}
    tensors.check_unread(layers)
    return traverse_util.unflatten_dict(flat)


def _read_config(weights_path: epath.Path) -> tuple[str, dict[str, Any]]:
    """The kind of tower, and the fields of `TextConfig` in the config.json beside the weights."""
    path = weights_path.parent / CONFIG_NAME
    if not path.is_file():
        raise RunError(f"{path} does not exist: it comes with the weights and holds the sizes of the tower.")
    content = read_json(path)
    kind = content.get("model_type")
    if kind not in _TOWER_OF:
        raise RunError(f"{path}: model_type {kind!r} is no text tower; known are {', '.join(_TOWER_OF)}.")
    tower = _TOWER_OF[kind]
    if kind == "clip":
        # If a file has settings of the text under the second name too, these are the right ones.
        content = {**(content.get("text_config") or {}), **(content.get("text_config_dict") or {})}
    known = _CLIP_FIELDS if tower == "clip" else _T5_FIELDS
    fields = {
        field: read_setting(content, name, type(default), path, default) for field, (name, default) in known.items()
    }
    fields["activation"] = _activation(fields["activation"], tower, path)
    if tower == "clip" and fields["width"] % fields["num_heads"]:
        raise RunError(f"{path}: hidden_size {fields['width']} is no multiple of {fields['num_heads']} heads.")
    return tower, fields


def _activation(name: str, tower: str, path: epath.Path) -> str:
    """The name of an activation in `TextConfig`; the "gated-gelu" of T5 is the approximate GELU."""
    gated = tower == "t5" and name.startswith(GATED)
    plain = name.removeprefix(GATED) if gated else name
    plain = "gelu_new" if gated and plain == "gelu" else plain
    if plain not in ACTIVATIONS:
        raise RunError(f"{path}: the activation {name!r} is none of {', '.join(ACTIVATIONS)}.")
    return GATED + plain if gated else plain


def clip_text(weights: Weights, options: Options) -> Foreign:
    """The text tower of CLIPModel and CLIPTextModel of transformers."""
    del options
    config = text_config_of(weights.path, TextConfig(tower="clip"))
    return _as_it_is("clip", clip_table(config, _clip_prefix(weights)), config.depth, _CLIP_SKIPS)


def t5_encoder(weights: Weights, options: Options) -> Foreign:
    """The encoder of T5ForConditionalGeneration and T5EncoderModel of transformers."""
    del options
    config = text_config_of(weights.path, TextConfig(tower="t5"))
    return _as_it_is("t5", t5_table(config, _t5_tokens(weights)), config.depth, _T5_SKIPS)


def clip_table(config: TextConfig, prefix: str) -> Table:
    """The parameters of `ClipTextTower` in files of CLIPModel and CLIPTextModel, whose names begin with `prefix`."""
    width = config.width
    return {
        "token_embed": array(f"{prefix}embeddings.token_embedding.weight", config.vocabulary_size, width),
        "pos_embed": array(f"{prefix}embeddings.position_embedding.weight", config.num_positions, width),
        **clip_blocks(f"{prefix}encoder.layers.", width, config.num_heads, config.mlp_width),
        **norm("norm", f"{prefix}final_layer_norm", width),
    }


def t5_table(config: TextConfig, tokens: str) -> Table:
    """The parameters of `T5Tower` in files of T5 and T5EncoderModel; `tokens` is one of `T5_TOKENS`."""
    width, hidden, heads = config.width, config.mlp_width, (config.num_heads, config.head_width)
    attention, mlp = (f"encoder.block.{{layer}}.layer.{part}." for part in (0, 1))
    inner = f"{mlp}DenseReluDense."
    gated = config.activation.startswith(GATED)
    blocks = {
        "norm1/scale": array(f"{attention}layer_norm.weight", width),
        "attn/qkv/kernel": qkv_kernel([f"{attention}SelfAttention.{part}.weight" for part in "qkv"], width, heads),
        "attn/proj/kernel": kernel(f"{attention}SelfAttention.o.weight", heads, (width,)),
        "norm2/scale": array(f"{mlp}layer_norm.weight", width),
        "mlp/fc1/kernel": kernel(f"{inner}wi_0.weight" if gated else f"{inner}wi.weight", (width,), (hidden,)),
        **({"mlp/gate/kernel": kernel(f"{inner}wi_1.weight", (width,), (hidden,))} if gated else {}),
        "mlp/fc2/kernel": kernel(f"{inner}wo.weight", (hidden,), (width,)),
    }
    # All layers share the relative positions of the first.
    relative = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {
        "token_embed": array(tokens, config.vocabulary_size, width),
        "relative_bias": array(relative, config.relative_buckets, config.num_heads),
        **{f"blocks/layers/{path}": entry for path, entry in blocks.items()},
        "norm/scale": array("encoder.final_layer_norm.weight", width),
    }


def _as_it_is(family: str, table: Table, depth: int, skips: tuple[Skip, ...]) -> Foreign:
    """The tensors of a table, which stay as they are, each under its own name."""
    tensors: Table = {}
    for entry in table.values():
        for name in (name.format(layer=layer) for layer in range(depth) for name in entry.names):
            tensors[name] = array(name, *entry.shape)
    return Foreign(family, {}, single(tensors), skips)


def _clip_prefix(tensors: Tensors) -> str:
    """The prefix of the text tower within CLIP, which a text tower saved alone may lack."""
    return "text_model." if any(name.startswith("text_model.") for name in tensors.files) else ""


def _t5_tokens(tensors: Tensors) -> str:
    return next((name for name in T5_TOKENS if name in tensors.files), T5_TOKENS[0])
