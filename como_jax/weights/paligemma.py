"""PaliGemma (arXiv 2407.07726) with weights that a user brings as Hugging Face saves them.

`paligemma_sizes` reads the sizes for a policy's config, `load_paligemma` the parameters of its observation encoder and
decoder. All generations of tensor names are understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from como_jax.errors import RunError
from como_jax.spec.towers import DecoderConfig, VitConfig
from como_jax.weights.tables import DeepTable, Table, array, entry_shape, kernel, linear, make_parameter, single
from como_jax.weights.tensors import CONFIG_NAME, Tensors, read_json, read_setting
from como_jax.weights.vit_encoders import siglip_table

# The names of our fields in config.json, their kind, and their values in a file that leaves them out.
_ENCODER_FIELDS: dict[str, tuple[str, type, Any]] = {
    "patch_size": ("patch_size", int, 16),
    "width": ("hidden_size", int, None),
    "depth": ("num_hidden_layers", int, None),
    "num_heads": ("num_attention_heads", int, None),
    "mlp_width": ("intermediate_size", int, None),
}
_DECODER_FIELDS: dict[str, tuple[str, type, Any]] = {
    "width": ("hidden_size", int, None),
    "depth": ("num_hidden_layers", int, None),
    "num_heads": ("num_attention_heads", int, None),
    "num_kv_heads": ("num_key_value_heads", int, None),
    "head_size": ("head_dim", int, 256),
    "mlp_width": ("intermediate_size", int, None),
    "rope_period": ("rope_theta", float, 10_000.0),
    "norm_epsilon": ("rms_norm_eps", float, 1e-6),
}
_TANH_GELU = "gelu_pytorch_tanh"

# The prefixes of each part in files of several generations, and a tensor by which the part is found.
_VISION = ("vision_tower.vision_model.", "vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower.")
_VISION_MARK = "embeddings.patch_embedding.weight"
_PROJECTOR = ("multi_modal_projector.linear", "model.multi_modal_projector.linear")
_LANGUAGE = ("language_model.model.", "model.language_model.", "language_model.")
_LANGUAGE_MARK = "embed_tokens.weight"
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")

_NEW_EMBEDDINGS = ("image_pos", "camera_embed", "instant_embed")
"""Embeddings of `ObservationEncoder` that PaliGemma lacks; zeros leave its outputs unchanged."""


def paligemma_sizes(weights_path: epath.PathLike) -> dict[str, dict[str, Any]]:
    """The fields of a policy's config that weights determine, by section: data, encoder, text and model.

    Args:
      weights_path: of the .safetensors file, or of the .safetensors.index.json of several, beside config.json.

    Raises:
      RunError: there is no config.json, or it does not describe a PaliGemma.
    """
    path = epath.Path(weights_path).parent / CONFIG_NAME
    if not path.is_file():
        raise RunError(f"{path} does not exist: it comes with the weights and holds their sizes.")
    content = read_json(path)
    _check_equal(content, "model_type", ("paligemma",), path)
    vision, text = (_section(content, name, path) for name in ("vision_config", "text_config"))
    # PaliGemma 2 has the blocks of Gemma 2, which are different.
    _check_equal(text, "model_type", ("gemma",), path)
    _check_equal(text, "hidden_act", (_TANH_GELU, "gelu"), path)
    _check_equal(vision, "hidden_act", (_TANH_GELU,), path)
    _check_equal(vision, "layer_norm_eps", (1e-6,), path)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    for name in ("rope_type", "type"):
        _check_equal(rope, name, ("default",), path)
    encoder, decoder = _read(_ENCODER_FIELDS, vision, path), _read(_DECODER_FIELDS, {**text, **rope}, path)
    if encoder["width"] % encoder["num_heads"]:
        raise RunError(f"{path}: hidden_size {encoder['width']} is no multiple of {encoder['num_heads']} heads.")
    return {
        "data": {"image_size": read_setting(vision, "image_size", int, path, 224)},
        "encoder": {"tower": "siglip", **encoder},
        "text": {"tower": "tokens", "vocabulary_size": read_setting(text, "vocab_size", int, path)},
        "model": decoder,
    }


def load_paligemma(weights_path: epath.PathLike, params: Mapping[str, Any], *, release: bool = False) -> dict[str, Any]:
    """Reads the parameters of a policy that come from PaliGemma, with zeros for the embeddings that it lacks.

    They are read one at a time, and each takes the dtype and the sharding of the parameter that it replaces. Parameters
    that do not belong to PaliGemma, such as action heads and low-rank changes, are left out.

    Args:
      weights_path: of the .safetensors file, or of the .safetensors.index.json of several, beside config.json.
      params: of the policy, nested; arrays or `jax.ShapeDtypeStruct`.
      release: whether to free each array before its replacement is read, since a device may not hold both. The arrays
        cannot be used afterwards.

    Raises:
      RunError: a file is missing or damaged, a tensor is missing, unknown or of another shape, or the policy has
        other sizes.
    """
    path = epath.Path(weights_path)
    sizes, tensors = paligemma_sizes(path), Tensors(path)
    encoder, decoder = dict(sizes["encoder"]), DecoderConfig(**sizes["model"])
    encoder.pop("tower")
    vit = VitConfig(image_size=sizes["data"]["image_size"], **encoder)
    rows = sizes["text"]["vocabulary_size"]
    entries = {
        **_images_table(vit, decoder.width, tensors),
        **{name: (entry, decoder.depth) for name, entry in _language_table(decoder, rows, tensors).items()},
    }
    wanted = {"/".join(map(str, name)): leaf for name, leaf in traverse_util.flatten_dict(dict(params)).items()}
    for name, (entry, depth) in entries.items():
        _check_shape(path, name, entry_shape(entry, depth), wanted)
    _check_tied(tensors, rows, decoder.width)
    found = {}
    for name, (entry, depth) in entries.items():
        leaf, place = wanted[name], getattr(wanted[name], "sharding", None)
        if release and isinstance(leaf, jax.Array):
            leaf.delete()
        found[name] = _put(make_parameter(entry, depth, tensors, leaf.dtype), place)
    tensors.check_unread()
    for name in (f"observation/{embedding}" for embedding in _NEW_EMBEDDINGS):
        leaf = wanted[name]
        found[name] = _put(np.zeros(leaf.shape, leaf.dtype), getattr(leaf, "sharding", None))
    return traverse_util.unflatten_dict(found, sep="/")


def _images_table(config: VitConfig, width: int, tensors: Tensors) -> DeepTable:
    """The parameters of `Siglip`, and of the projector to the decoder's width."""
    prefix = _prefix(tensors, _VISION, _VISION_MARK)
    place = array(f"{prefix}embeddings.position_embedding.weight", config.grid**2, config.width)
    sizes = {name: getattr(config, name) for name in ("patch_size", "width", "depth", "num_heads", "mlp_width")}
    projector = _prefix(tensors, _PROJECTOR, ".weight")
    return {
        **siglip_table("observation/images", prefix, place, **sizes),
        **single(linear("observation/image_proj", projector, config.width, width)),
    }


def _language_table(config: DecoderConfig, rows: int, tensors: Tensors) -> Table:
    """The table of tokens and the parameters of `Decoder`."""
    prefix = _prefix(tensors, _LANGUAGE, _LANGUAGE_MARK)
    layer, width, hidden = f"{prefix}layers.{{layer}}.", (config.width,), (config.mlp_width,)
    heads, shared = (config.num_heads, config.head_size), (config.num_kv_heads, config.head_size)
    blocks = {
        "norm1/scale": array(f"{layer}input_layernorm.weight", config.width),
        "attn/q/kernel": kernel(f"{layer}self_attn.q_proj.weight", width, heads),
        "attn/k/kernel": kernel(f"{layer}self_attn.k_proj.weight", width, shared),
        "attn/v/kernel": kernel(f"{layer}self_attn.v_proj.weight", width, shared),
        "attn/proj/kernel": kernel(f"{layer}self_attn.o_proj.weight", heads, width),
        "norm2/scale": array(f"{layer}post_attention_layernorm.weight", config.width),
        "mlp/gate/kernel": kernel(f"{layer}mlp.gate_proj.weight", width, hidden),
        "mlp/up/kernel": kernel(f"{layer}mlp.up_proj.weight", width, hidden),
        "mlp/down/kernel": kernel(f"{layer}mlp.down_proj.weight", hidden, width),
    }
    return {
        "observation/text/table": array(f"{prefix}{_LANGUAGE_MARK}", rows, config.width),
        **{f"decoder/blocks/layers/{name}": entry for name, entry in blocks.items()},
        "decoder/norm/scale": array(f"{prefix}norm.weight", config.width),
    }


def _prefix(tensors: Tensors, choices: tuple[str, ...], mark: str) -> str:
    return next((prefix for prefix in choices if f"{prefix}{mark}" in tensors.files), choices[0])


def _check_shape(path: epath.Path, name: str, shape: tuple[int, ...], wanted: Mapping[str, Any]) -> None:
    if name not in wanted:
        raise RunError(
            f"{path} has {name}, which the policy lacks; a PaliGemma has encoder.tower=siglip and text.tower=tokens."
        )
    if wanted[name].shape != shape:
        raise RunError(
            f"{path}: {name} is {shape} and in the policy {wanted[name].shape}; the config must have the sizes that "
            f"{CONFIG_NAME} beside the weights gives."
        )


def _check_tied(tensors: Tensors, rows: int, width: int) -> None:
    """Raises RunError unless the output head equals the token table, since the policy has only the table."""
    shape, table = (rows, width), f"{_prefix(tensors, _LANGUAGE, _LANGUAGE_MARK)}{_LANGUAGE_MARK}"
    for head in (name for name in _HEADS if name in tensors.files):
        if not np.array_equal(tensors.take(head, shape), tensors.take(table, shape)):
            raise RunError(f"{tensors.path}: {head} is not {table}; in a PaliGemma they are tied.")


def _put(value: np.ndarray, place: jax.sharding.Sharding | None) -> Any:
    return value if place is None else jax.device_put(value, place)


def _section(content: Mapping[str, Any], name: str, path: epath.Path) -> Mapping[str, Any]:
    section = content.get(name)
    if not isinstance(section, dict):
        raise RunError(f"{path} has no {name}.")
    return section


def _check_equal(content: Mapping[str, Any], name: str, known: tuple[Any, ...], path: epath.Path) -> None:
    """Raises RunError if a setting exists and has an unknown value."""
    if content.get(name) not in (None, *known):
        raise RunError(f"{path}: {name} {content[name]!r} is none of {', '.join(map(str, known))}.")


def _read(fields: Mapping[str, tuple[str, type, Any]], content: Mapping[str, Any], path: epath.Path) -> dict[str, Any]:
    return {field: read_setting(content, name, kind, path, default) for field, (name, kind, default) in fields.items()}
