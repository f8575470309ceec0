"""Where parameters are found in files of PyTorch, for reading and for writing, and the reading of these files."""

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

from como_jax.errors import ConversionError, RunError

CONFIG_NAME = "config.json"
_INDEX_SUFFIX = ".safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a parameter is made.

    Attributes:
      names: of tensors of the file; where they hold `{layer}`, there is one set for each layer.
      shape: of each tensor.
      make: the parameter, or one layer's part of it, of the tensors in the order of their names.
      unmake: the inverse of `make`: the tensors of the parameter; None where a format is only read.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., np.ndarray]
    unmake: Callable[[np.ndarray], Sequence[np.ndarray]] | None = None


Table = dict[str, Entry]
"""An entry for every parameter, by its path."""

DeepTable = dict[str, tuple[Entry, int]]
"""A table of a model with several stacks: beside every entry the number of its layers, 1 where it has none."""


def array(name: str, *shape: int) -> Entry:
    """A tensor as it is."""
    return Entry((name,), shape, np.asarray, lambda value: [value])


def flat(name: str, *shape: int) -> Entry:
    """An array of some shape, of which the file has all numbers in one row."""
    size = int(np.prod(shape))
    return Entry((name,), (size,), lambda row: row.reshape(shape), lambda value: [value.reshape(size)])


def patches(name: str, width: int, patch_size: int) -> Entry:
    """`[p * p * 3, D]` over (row, column, channel), of a convolution whose steps are as long as its kernel."""
    shape = (width, 3, patch_size, patch_size)

    def make(weight: np.ndarray) -> np.ndarray:
        return weight.transpose(2, 3, 1, 0).reshape(-1, width)

    def unmake(value: np.ndarray) -> list[np.ndarray]:
        return [value.reshape(patch_size, patch_size, 3, width).transpose(3, 2, 0, 1)]

    return Entry((name,), shape, make, unmake)


def kernel(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Entry:
    """`[*inputs, *outputs]` of the weights of a linear layer, which PyTorch keeps as `[outputs, inputs]`."""
    shape = (int(np.prod(outputs)), int(np.prod(inputs)))

    def make(weight: np.ndarray) -> np.ndarray:
        return weight.T.reshape(*inputs, *outputs)

    return Entry((name,), shape, make, lambda value: [value.reshape(shape[::-1]).T])


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

    def unmake(value: np.ndarray) -> list[np.ndarray]:
        return [part.reshape(width, -1).T for part in np.moveaxis(value, 1, 0)]

    return Entry(tuple(names), (heads[0] * heads[1], width), make, unmake)


def qkv_bias(names: Sequence[str], heads: tuple[int, int]) -> Entry:
    """`[3, H, K]` of the biases of queries, keys and values."""

    def make(*parts: np.ndarray) -> np.ndarray:
        return np.stack([part.reshape(heads) for part in parts])

    return Entry(tuple(names), (heads[0] * heads[1],), make, lambda value: [part.reshape(-1) for part in value])


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


def write_parameter(entry: Entry, value: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a parameter, by name: the inverse of `make_parameter`.

    Raises:
      ConversionError: the entry belongs to a format that is only read, or the parameter has another shape.
    """
    layers = enumerate(value) if _is_stacked(entry) else [(0, value)]
    return {
        name.format(layer=layer): tensor
        for layer, part in layers
        for name, tensor in zip(entry.names, _unmake(entry, part), strict=True)
    }


def write_tensors(table: DeepTable, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of all parameters, by name.

    Args:
      table: of the model.
      params: by their paths.

    Raises:
      ConversionError: a parameter has no entry, or an entry no parameter, or one of another shape.
    """
    for where, names in (("parameters", table.keys() - params.keys()), ("table", params.keys() - table.keys())):
        if names:
            raise ConversionError(f"The {where} of the model lack {min(names)}, so that it cannot be written.")
    tensors: dict[str, np.ndarray] = {}
    for path, (entry, depth) in table.items():
        if params[path].shape != entry_shape(entry, depth):
            raise ConversionError(f"{path} is {params[path].shape} and must be {entry_shape(entry, depth)}.")
        tensors |= write_parameter(entry, params[path])
    return tensors


def make_parameters(table: DeepTable, tensors: Tensors) -> dict[str, np.ndarray]:
    """All parameters, by their paths; raises RunError where a tensor is missing or of another shape."""
    return {path: make_parameter(entry, depth, tensors) for path, (entry, depth) in table.items()}


def _unmake(entry: Entry, part: np.ndarray) -> Sequence[np.ndarray]:
    if entry.unmake is None:
        raise ConversionError(f"{entry.names[0]} belongs to a format that is only read.")
    return [np.ascontiguousarray(tensor) for tensor in entry.unmake(part)]


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
