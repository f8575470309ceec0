"""Where the parameters of text towers are found in files of Hugging Face, and the reading of these files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from como_jax.errors import RunError
from como_jax.models.text import TextConfig
from como_jax.models.text_layers import GATED

CONFIG_NAME = "config.json"
_INDEX_SUFFIX = ".safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a parameter is made.

    Attributes:
      names: of tensors of the file; where they hold `{layer}`, there is one set for each layer.
      shape: of each tensor.
      make: the parameter, or one layer's part of it, of the tensors in the order of their names.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., np.ndarray]


def clip_table(config: TextConfig, prefix: str) -> dict[str, Entry]:
    """Where the parameters of `ClipTextTower` are found in files of CLIPModel and CLIPTextModel."""
    width, hidden = config.width, config.mlp_width
    heads = (config.num_heads, width // config.num_heads)
    layer = f"{prefix}encoder.layers.{{layer}}."
    attention = f"{layer}self_attn."

    def norm(path: str, name: str) -> dict[str, Entry]:
        return {f"{path}/scale": _array(f"{name}.weight", width), f"{path}/bias": _array(f"{name}.bias", width)}

    def linear(path: str, name: str, inputs: int, outputs: int) -> dict[str, Entry]:
        bias = _array(f"{name}.bias", outputs)
        return {f"{path}/kernel": _kernel(f"{name}.weight", inputs, outputs), f"{path}/bias": bias}

    blocks = {
        **norm("norm1", f"{layer}layer_norm1"),
        "attn/qkv/kernel": _qkv_kernel([f"{attention}{part}_proj.weight" for part in "qkv"], width, heads),
        "attn/qkv/bias": _qkv_bias([f"{attention}{part}_proj.bias" for part in "qkv"], heads),
        "attn/proj/kernel": _merging_kernel(f"{attention}out_proj.weight", heads, width),
        "attn/proj/bias": _array(f"{attention}out_proj.bias", width),
        **norm("norm2", f"{layer}layer_norm2"),
        **linear("mlp/fc1", f"{layer}mlp.fc1", width, hidden),
        **linear("mlp/fc2", f"{layer}mlp.fc2", hidden, width),
    }
    return {
        "token_embed": _array(f"{prefix}embeddings.token_embedding.weight", config.vocabulary_size, width),
        "pos_embed": _array(f"{prefix}embeddings.position_embedding.weight", config.positions, width),
        **{f"blocks/layers/{path}": entry for path, entry in blocks.items()},
        **norm("norm", f"{prefix}final_layer_norm"),
    }


T5_TOKENS = ("shared.weight", "encoder.embed_tokens.weight")
"""Names of the table of tokens, which is saved once or twice."""


def t5_table(config: TextConfig, tokens: str) -> dict[str, Entry]:
    """Where the parameters of `T5Tower` are found in files of T5 and T5EncoderModel; `tokens` is one of `T5_TOKENS`."""
    width, hidden, heads = config.width, config.mlp_width, (config.num_heads, config.head_size)
    attention, mlp = (f"encoder.block.{{layer}}.layer.{part}." for part in (0, 1))
    inner = f"{mlp}DenseReluDense."
    gated = config.activation.startswith(GATED)
    blocks = {
        "norm1/scale": _array(f"{attention}layer_norm.weight", width),
        "attn/qkv/kernel": _qkv_kernel([f"{attention}SelfAttention.{part}.weight" for part in "qkv"], width, heads),
        "attn/proj/kernel": _merging_kernel(f"{attention}SelfAttention.o.weight", heads, width),
        "norm2/scale": _array(f"{mlp}layer_norm.weight", width),
        "mlp/fc1/kernel": _kernel(f"{inner}wi_0.weight" if gated else f"{inner}wi.weight", width, hidden),
        **({"mlp/gate/kernel": _kernel(f"{inner}wi_1.weight", width, hidden)} if gated else {}),
        "mlp/fc2/kernel": _kernel(f"{inner}wo.weight", hidden, width),
    }
    # All layers share the relative positions of the first.
    relative = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return {
        "token_embed": _array(tokens, config.vocabulary_size, width),
        "relative_bias": _array(relative, config.relative_buckets, config.num_heads),
        **{f"blocks/layers/{path}": entry for path, entry in blocks.items()},
        "norm/scale": _array("encoder.final_layer_norm.weight", width),
    }


def _array(name: str, *shape: int) -> Entry:
    return Entry((name,), shape, np.asarray)


def _kernel(name: str, inputs: int, outputs: int) -> Entry:
    """PyTorch keeps the weights of linear layers as `[outputs, inputs]`."""
    return Entry((name,), (outputs, inputs), np.transpose)


def _qkv_kernel(names: list[str], width: int, heads: tuple[int, int]) -> Entry:
    def make(*parts: np.ndarray) -> np.ndarray:
        return np.stack([part.T.reshape(width, *heads) for part in parts], axis=1)

    return Entry(tuple(names), (heads[0] * heads[1], width), make)


def _qkv_bias(names: list[str], heads: tuple[int, int]) -> Entry:
    def make(*parts: np.ndarray) -> np.ndarray:
        return np.stack([part.reshape(heads) for part in parts])

    return Entry(tuple(names), (heads[0] * heads[1],), make)


def _merging_kernel(name: str, heads: tuple[int, int], width: int) -> Entry:
    return Entry((name,), (width, heads[0] * heads[1]), lambda weight: weight.T.reshape(*heads, width))


def make_parameter(entry: Entry, depth: int, tensors: Tensors) -> np.ndarray:
    """The parameter; raises RunError where a tensor is missing or of another shape."""

    def make(layer: int) -> np.ndarray:
        return entry.make(*(tensors.take(name.format(layer=layer), entry.shape) for name in entry.names))

    return np.stack([make(layer) for layer in range(depth)]) if "{layer}" in entry.names[0] else make(0)


class Tensors:
    """The tensors of one or several safetensors files, read one by one.

    Attributes:
      files: the file of every tensor.
    """

    def __init__(self, path: epath.Path):
        if not path.is_file():
            raise RunError(f"{path} does not exist: name a .safetensors file of text weights.")
        self.path, self._read = path, set()
        if path.name.endswith(_INDEX_SUFFIX):
            files = read_json(path).get("weight_map") or {}
            self.files = {name: path.parent / file for name, file in files.items()}
        elif path.suffix == ".safetensors":
            self.files = self._open(path, lambda file: dict.fromkeys(file.keys(), path))
        else:
            raise RunError(
                f"{path} is not a .safetensors file; save PyTorch weights as safetensors first, with "
                "model.save_pretrained(DIR, safe_serialization=True)."
            )

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A tensor in float32; raises RunError unless it is there and of this shape."""
        if name not in self.files:
            raise RunError(f"{self.path} has no tensor {name}, which a tower as {CONFIG_NAME} describes it needs.")
        tensor = self._open(self.files[name], lambda file: file.get_tensor(name))
        if tensor.shape != shape:
            raise RunError(f"{self.path}: tensor {name} is {tensor.shape} and by {CONFIG_NAME} must be {shape}.")
        self._read.add(name)
        return tensor.astype(np.float32)

    def check_unread(self, prefix: str) -> None:
        """Raises RunError if a tensor whose name starts so has not been taken."""
        unread = sorted(name for name in self.files if name.startswith(prefix) and name not in self._read)
        if unread:
            raise RunError(
                f"{self.path} has {len(unread)} tensors more than {CONFIG_NAME} has layers for, such as {unread[0]}."
            )

    def _open(self, path: epath.Path, read: Callable[[Any], Any]) -> Any:
        try:
            with safe_open(os.fspath(path), framework="np") as file:
                return read(file)
        except (SafetensorError, OSError, TypeError) as error:
            raise RunError(f"{path} cannot be read as safetensors ({type(error).__name__}: {error}).") from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON object; raises RunError where the file holds something else."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} must hold a JSON object.")
    return content
