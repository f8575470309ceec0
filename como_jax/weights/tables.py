"""Where parameters are found in files of Hugging Face, and the reading of these files."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from numpy.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from como_jax.errors import RunError

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


Table = dict[str, Entry]
"""An entry for every parameter, by its path."""


def array(name: str, *shape: int) -> Entry:
    """A tensor as it is."""
    return Entry((name,), shape, np.asarray)


def kernel(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Entry:
    """`[*inputs, *outputs]` of the weights of a linear layer, which PyTorch keeps as `[outputs, inputs]`."""
    shape = (int(np.prod(outputs)), int(np.prod(inputs)))
    return Entry((name,), shape, lambda weight: weight.T.reshape(*inputs, *outputs))


def norm(path: str, name: str, width: int) -> Table:
    """A layer norm."""
    return {f"{path}/scale": array(f"{name}.weight", width), f"{path}/bias": array(f"{name}.bias", width)}


def linear(path: str, name: str, inputs: int, outputs: int) -> Table:
    """A linear layer with its bias."""
    return {
        f"{path}/kernel": kernel(f"{name}.weight", (inputs,), (outputs,)),
        f"{path}/bias": array(f"{name}.bias", outputs),
    }


def qkv_kernel(names: Sequence[str], width: int, heads: tuple[int, int]) -> Entry:
    """`[D, 3, H, K]` of the weights of queries, keys and values."""

    def make(*parts: np.ndarray) -> np.ndarray:
        return np.stack([part.T.reshape(width, *heads) for part in parts], axis=1)

    return Entry(tuple(names), (heads[0] * heads[1], width), make)


def qkv_bias(names: Sequence[str], heads: tuple[int, int]) -> Entry:
    """`[3, H, K]` of the biases of queries, keys and values."""

    def make(*parts: np.ndarray) -> np.ndarray:
        return np.stack([part.reshape(heads) for part in parts])

    return Entry(tuple(names), (heads[0] * heads[1],), make)


def clip_blocks(layers: str, width: int, num_heads: int, hidden: int) -> Table:
    """The stack of blocks that CLIP and SigLIP have, text and images alike; `layers` is where the file has it."""
    heads, layer = (num_heads, width // num_heads), f"{layers}{{layer}}."
    attention = f"{layer}self_attn."
    blocks = {
        **norm("norm1", f"{layer}layer_norm1", width),
        "attn/qkv/kernel": qkv_kernel([f"{attention}{part}_proj.weight" for part in "qkv"], width, heads),
        "attn/qkv/bias": qkv_bias([f"{attention}{part}_proj.bias" for part in "qkv"], heads),
        "attn/proj/kernel": kernel(f"{attention}out_proj.weight", heads, (width,)),
        "attn/proj/bias": array(f"{attention}out_proj.bias", width),
        **norm("norm2", f"{layer}layer_norm2", width),
        **linear("mlp/fc1", f"{layer}mlp.fc1", width, hidden),
        **linear("mlp/fc2", f"{layer}mlp.fc2", hidden, width),
    }
    return {f"blocks/layers/{path}": entry for path, entry in blocks.items()}


def entry_shape(entry: Entry, depth: int) -> tuple[int, ...]:
    """The shape of a parameter, without reading it."""
    # A view of one number serves as a tensor of any size.
    part = entry.make(*(np.broadcast_to(np.int8(0), entry.shape) for _ in entry.names)).shape
    return (depth, *part) if _is_stacked(entry) else part


def make_parameter(entry: Entry, depth: int, tensors: Tensors, dtype: DTypeLike = np.float32) -> np.ndarray:
    """The parameter; raises RunError where a tensor is missing or of another shape."""

    def make(layer: int) -> np.ndarray:
        return entry.make(*(tensors.take(name.format(layer=layer), entry.shape) for name in entry.names))

    first = make(0)
    if not _is_stacked(entry):
        return np.ascontiguousarray(first, dtype)
    # Layer by layer into its place, so that there is never a second copy.
    stacked = np.empty((depth, *first.shape), dtype)
    stacked[0] = first
    for layer in range(1, depth):
        stacked[layer] = make(layer)
    return stacked


def _is_stacked(entry: Entry) -> bool:
    return "{layer}" in entry.names[0]


class Tensors:
    """The tensors of one or several safetensors files, read one by one.

    Attributes:
      files: the file of every tensor.
    """

    def __init__(self, path: epath.Path):
        if not path.is_file():
            raise RunError(f"{path} does not exist: name a .safetensors file of weights.")
        self.path = path
        self._read: set[str] = set()
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
        """A tensor as the file has it; raises RunError unless it is there and of this shape."""
        if name not in self.files:
            raise RunError(f"{self.path} has no tensor {name}, which a model as {CONFIG_NAME} describes it needs.")
        tensor = self._open(self.files[name], lambda file: file.get_tensor(name))
        if tensor.shape != shape:
            raise RunError(f"{self.path}: tensor {name} is {tensor.shape} and by {CONFIG_NAME} must be {shape}.")
        self._read.add(name)
        return tensor

    def check_unread(self, prefix: str = "") -> None:
        """Raises RunError if a tensor whose name starts so has not been taken."""
        unread = sorted(name for name in self.files if name.startswith(prefix) and name not in self._read)
        if unread:
            raise RunError(
                f"{self.path} has {len(unread)} tensors more than {CONFIG_NAME} describes, such as {unread[0]}."
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


def read_setting(content: Mapping[str, Any], name: str, kind: type, path: epath.Path, default: Any = None) -> Any:
    """A name or a positive number of a config.json.

    Args:
      content: of the file, or of one of its sections.
      name: of the setting.
      kind: str, int or float.
      path: of the file, for messages.
      default: what a file means that leaves the setting out; None for those that have to be there.

    Raises:
      RunError: it is missing or of another kind.
    """
    value = content.get(name, default)
    if kind is str:
        fits = isinstance(value, str)
    else:
        fits = isinstance(value, int | float if kind is float else int) and value > 0
    if not fits:
        wanted = {str: "name", int: "positive whole number", float: "positive number"}[kind]
        raise RunError(f"{path}: {name} {value!r} must be a {wanted}.")
    return kind(value)
