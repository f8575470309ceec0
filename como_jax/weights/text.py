"""Public text towers with the weights that a user brings, as Hugging Face saves them: safetensors and config.json.

`text_config_of` reads sizes, `load_text_tower` the parameters of `ClipTextTower` or `T5Tower`. Files that hold more
than the tower, such as the whole of CLIP or T5 with its decoder, serve as well.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from etils import epath
from flax import traverse_util

from como_jax.errors import ConfigError, RunError
from como_jax.nn.text_towers import ACTIVATIONS, GATED
from como_jax.spec.towers import TextConfig
from como_jax.weights.tables import CONFIG_NAME, Tensors, make_parameter, read_json, read_setting
from como_jax.weights.text_tables import T5_TOKENS, clip_table, t5_table

# What config.json calls the fields of `TextConfig`, and what a file means that leaves them out.
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


def text_config_of(weights_path: epath.PathLike, base: TextConfig) -> TextConfig:
    """The config with the sizes of some weights, as the config.json beside them gives them.

    Args:
      weights_path: of the .safetensors file, or of the .safetensors.index.json of several.
      base: gives all that weights do not say, and the kind of tower that is wanted.

    Raises:
      RunError: no config.json there, or one that describes no text tower.
      ConfigError: no weights are named, or they are of another kind of tower.
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
    """The parameters of a text tower, as nested float32 arrays.

    Args:
      weights_path: of the .safetensors file, or of the .safetensors.index.json of several; config.json lies beside it.

    Raises:
      RunError: a file is missing or unreadable, or a tensor is missing, of another shape or one too many.
    """
    path = epath.Path(weights_path)
    tower, fields = _read_config(path)
    config, tensors = TextConfig(tower=tower, **fields), Tensors(path)
    if tower == "clip":
        # The text encoder alone may be saved without the prefix that it has within CLIP.
        prefix = "text_model." if any(name.startswith("text_model.") for name in tensors.files) else ""
        table, layers = clip_table(config, prefix), f"{prefix}encoder.layers."
    else:
        shared = next((name for name in T5_TOKENS if name in tensors.files), T5_TOKENS[0])
        table, layers = t5_table(config, shared), "encoder.block."
    flat = {tuple(name.split("/")): make_parameter(entry, config.depth, tensors) for name, entry in table.items()}
    tensors.check_unread(layers)
    return traverse_util.unflatten_dict(flat)


def _read_config(weights_path: epath.Path) -> tuple[str, dict[str, Any]]:
    """The kind of tower and the fields of `TextConfig` that the config.json beside the weights gives."""
    path = weights_path.parent / CONFIG_NAME
    if not path.is_file():
        raise RunError(f"{path} does not exist: it comes with the weights and tells the sizes of the tower.")
    content = read_json(path)
    kind = content.get("model_type")
    if kind not in _TOWER_OF:
        raise RunError(f"{path}: model_type {kind!r} is no text tower; known are {', '.join(_TOWER_OF)}.")
    tower = _TOWER_OF[kind]
    if kind == "clip":
        # Some files keep the text's settings under the second name, which then holds.
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
    """As `TextConfig` calls it: what T5 calls "gated-gelu" has the approximate GELU."""
    gated = tower == "t5" and name.startswith(GATED)
    plain = name.removeprefix(GATED) if gated else name
    plain = "gelu_new" if gated and plain == "gelu" else plain
    if plain not in ACTIVATIONS:
        raise RunError(f"{path}: the activation {name!r} is none of {', '.join(ACTIVATIONS)}.")
    return GATED + plain if gated else plain
