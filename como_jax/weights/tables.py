"""Tables that say where the parameters of a model lie in files of PyTorch; they serve reading and writing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import DTypeLike

from como_jax.errors import ConversionError
from como_jax.weights.tensors import Tensors


@dataclasses.dataclass(frozen=True)
class Entry:
    """How one parameter is made from the tensors of a file, and these from the parameter.

    Attributes:
      names: of the tensors. If they contain `{layer}`, each layer of a stack has its own tensors.
      shape: of each tensor.
      make: from the tensors, in the order of `names`, to the parameter or to one layer of it.
      unmake: the inverse of `make`; None for a format that is only read.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., np.ndarray]
    unmake: Callable[[np.ndarray], Sequence[np.ndarray]] | None = None


Table = dict[str, Entry]
"""Entries by the path of the parameter."""

DeepTable = dict[str, tuple[Entry, int]]
"""A table of a model with several stacks: entries and the number of their layers, which is 1 outside of stacks."""


def array(name: str, *shape: int) -> Entry:
    """A tensor that is used as it is."""
    return Entry((name,), shape, np.asarray, lambda value: [value])


def flat(name: str, *shape: int) -> Entry:
    """An array of some shape that the file keeps as one row of numbers."""
    size = int(np.prod(shape))
    return Entry((name,), (size,), lambda row: row.reshape(shape), lambda value: [value.reshape(size)])


def patches(name: str, width: int, patch_size: int) -> Entry:
    """The kernel `[p * p * 3, D]` of a patch embedding, which PyTorch keeps as a convolution `[D, 3, p, p]`."""
    shape = (width, 3, patch_size, patch_size)

    def make(weight: np.ndarray) -> np.ndarray:
        return weight.transpose(2, 3, 1, 0).reshape(-1, width)

    def unmake(value: np.ndarray) -> list[np.ndarray]:
        return [value.reshape(patch_size, patch_size, 3, width).transpose(3, 2, 0, 1)]

    return Entry((name,), shape, make, unmake)


def kernel(name: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Entry:
    """The kernel `[*inputs, *outputs]` of a linear layer, which PyTorch keeps as `[outputs, inputs]`."""
    shape = (int(np.prod(outputs)), int(np.prod(inputs)))

    def make(weight: np.ndarray) -> np.ndarray:
        return weight.T.reshape(*inputs, *outputs)

    return Entry((name,), shape, make, lambda value: [value.reshape(shape[::-1]).T])


def norm(path: str, name: str, width: int) -> Table:
    """A layer norm."""
    return {f"{path}/scale": array(f"{name}.weight", width), f"{path}/bias": array(f"{name}.bias", width)}


def linear(path: str, name: str, inputs: int, outputs: int) -> Table:
    """A linear layer with bias."""
    return {
        f"{path}/kernel": kernel(f"{name}.weight", (inputs,), (outputs,)),
        f"{path}/bias": array(f"{name}.bias", outputs),
    }


def qkv_kernel(names: Sequence[str], width: int, heads: tuple[int, int]) -> Entry:
    """One kernel `[D, 3, H, K]` of separate queries, keys and values."""

    def make(*parts: np.ndarray) -> np.ndarray:
        return np.stack([part.T.reshape(width, *heads) for part in parts], axis=1)

    def unmake(value: np.ndarray) -> list[np.ndarray]:
        return [part.reshape(width, -1).T for part in np.moveaxis(value, 1, 0)]

    return Entry(tuple(names), (heads[0] * heads[1], width), make, unmake)


def qkv_bias(names: Sequence[str], heads: tuple[int, int]) -> Entry:
    """One bias `[3, H, K]` of separate queries, keys and values."""

    def make(*parts: np.ndarray) -> np.ndarray:
        return np.stack([part.reshape(heads) for part in parts])

    return Entry(tuple(names), (heads[0] * heads[1],), make, lambda value: [part.reshape(-1) for part in value])


def channels_first(name: str, shape: tuple[int, ...], axis: int) -> Entry:
    """An array over the pixels of patches, or the transpose of a matrix over them.

    Along `axis` the file goes over (channel, row, column), and the parameter over (row, column, channel).
    """
    side = math.isqrt(shape[axis] // 3)
    order = np.arange(shape[axis]).reshape(3, side, side).transpose(1, 2, 0).reshape(-1)

    def make(weight: np.ndarray) -> np.ndarray:
        return np.take(weight, order, axis).T

    return Entry((name,), shape, make, lambda value: [np.take(value.T, np.argsort(order), axis)])


def patch_table(path: str, name: str, width: int, patch_size: int) -> Table:
    """A patch embedding, which the file keeps as a convolution."""
    return {
        f"{path}/kernel": patches(f"{name}.weight", width, patch_size),
        f"{path}/bias": array(f"{name}.bias", width),
    }


def stacked(path: str, block: Table, depth: int) -> DeepTable:
    """The table of a `Stack` at a path, from the table of one layer; a stack of depth 0 has no parameters."""
    return {f"{path}/layers/{name}": (entry, depth) for name, entry in block.items()} if depth else {}


def part(path: str, table: Table, depth: int) -> DeepTable:
    """The table of a part of a model at a path; the names of its tensors begin with the same path."""
    prefix = path.replace("/", ".")
    return {
        f"{path}/{inner}": (dataclasses.replace(entry, names=tuple(f"{prefix}.{name}" for name in entry.names)), depth)
        for inner, entry in table.items()
    }


def single(table: Table) -> DeepTable:
    """A table of parameters outside of stacks."""
    return {path: (entry, 1) for path, entry in table.items()}


def timm_blocks(path: str, name: str, depth: int, width: int, num_heads: int, hidden: int) -> DeepTable:
    """A stack of blocks under the names of timm and of Facebook's MAE."""
    return stacked(path, timm_block(f"{name}.{{layer}}.", width, num_heads, hidden), depth)


def timm_block(layer: str, width: int, num_heads: int, hidden: int) -> Table:
    """One block of such a stack; `layer` is the beginning of the names, with `{layer}` for its number."""
    heads = (num_heads, width // num_heads)
    return {
        **norm("norm1", f"{layer}norm1", width),
        "attn/qkv/kernel": kernel(f"{layer}attn.qkv.weight", (width,), (3, *heads)),
        "attn/qkv/bias": flat(f"{layer}attn.qkv.bias", 3, *heads),
        "attn/proj/kernel": kernel(f"{layer}attn.proj.weight", heads, (width,)),
        "attn/proj/bias": array(f"{layer}attn.proj.bias", width),
        **norm("norm2", f"{layer}norm2", width),
        **linear("mlp/fc1", f"{layer}mlp.fc1", width, hidden),
        **linear("mlp/fc2", f"{layer}mlp.fc2", hidden, width),
    }


def huggingface_blocks(path: str, name: str, depth: int, width: int, num_heads: int, hidden: int) -> DeepTable:
    """A stack of blocks under the names of ViT in transformers."""
    heads, layer = (num_heads, width // num_heads), f"{name}.{{layer}}."
    attention, parts = f"{layer}attention.attention.", ("query", "key", "value")
    block = {
        **norm("norm1", f"{layer}layernorm_before", width),
        "attn/qkv/kernel": qkv_kernel([f"{attention}{part}.weight" for part in parts], width, heads),
        "attn/qkv/bias": qkv_bias([f"{attention}{part}.bias" for part in parts], heads),
        "attn/proj/kernel": kernel(f"{layer}attention.output.dense.weight", heads, (width,)),
        "attn/proj/bias": array(f"{layer}attention.output.dense.bias", width),
        **norm("norm2", f"{layer}layernorm_after", width),
        **linear("mlp/fc1", f"{layer}intermediate.dense", width, hidden),
        **linear("mlp/fc2", f"{layer}output.dense", hidden, width),
    }
    return stacked(path, block, depth)


def clip_blocks(layers: str, width: int, num_heads: int, hidden: int) -> Table:
    """The stack of CLIP and SigLIP, for text and images; `layers` is the beginning of the names of its tensors."""
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
    """The shape of a parameter; reads nothing."""
    # A view of one number stands for a tensor of any size.
    part = entry.make(*(np.broadcast_to(np.int8(0), entry.shape) for _ in entry.names)).shape
    return (depth, *part) if _is_stacked(entry) else part


def make_parameter(entry: Entry, depth: int, tensors: Tensors, dtype: DTypeLike = np.float32) -> np.ndarray:
    """Reads a parameter; raises RunError if a tensor is missing or has another shape."""

    def make(layer: int) -> np.ndarray:
        return entry.make(*(tensors.take(name.format(layer=layer), entry.shape) for name in entry.names))

    first = make(0)
    if not _is_stacked(entry):
        return np.ascontiguousarray(first, dtype)
    # Every layer is written into its place, so that there is never a second copy of the parameter.
    stacked = np.empty((depth, *first.shape), dtype)
    stacked[0] = first
    for layer in range(1, depth):
        stacked[layer] = make(layer)
    return stacked


def write_parameter(entry: Entry, value: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the tensors of a parameter by name; the inverse of `make_parameter`.

    Raises:
      ConversionError: the entry belongs to a format that is only read.
    """
    layers = enumerate(value) if _is_stacked(entry) else [(0, value)]
    return {
        name.format(layer=layer): tensor
        for layer, part in layers
        for name, tensor in zip(entry.names, _unmake(entry, part), strict=True)
    }


def write_tensors(table: DeepTable, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors of all parameters by name.

    Args:
      table: of the model.
      params: by their paths.

    Raises:
      ConversionError: parameters and entries do not match, or a parameter has another shape.
    """
    for where, names in (("parameters", table.keys() - params.keys()), ("table", params.keys() - table.keys())):
        if names:
            raise ConversionError(f"The {where} of the model lack {min(names)}, so it cannot be written.")
    tensors: dict[str, np.ndarray] = {}
    for path, (entry, depth) in table.items():
        if params[path].shape != entry_shape(entry, depth):
            raise ConversionError(f"{path} is {params[path].shape} and must be {entry_shape(entry, depth)}.")
        tensors |= write_parameter(entry, params[path])
    return tensors


def make_parameters(table: DeepTable, tensors: Tensors) -> dict[str, np.ndarray]:
    """Reads all parameters by their paths; raises RunError if a tensor is missing or has another shape."""
    return {path: make_parameter(entry, depth, tensors) for path, (entry, depth) in table.items()}


def _unmake(entry: Entry, part: np.ndarray) -> Sequence[np.ndarray]:
    if entry.unmake is None:
        raise ConversionError(f"{entry.names[0]} belongs to a format that is only read.")
    return [np.ascontiguousarray(tensor) for tensor in entry.unmake(part)]


def _is_stacked(entry: Entry) -> bool:
    return "{layer}" in entry.names[0]
