"""What the formats of vision transformers share: their blocks, patches and positions under two families of names."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from como_jax.errors import ConfigError, RunError
from como_jax.weights.checkpoints import Weights
from como_jax.weights.resize import resize_positions
from como_jax.weights.tables import (
    DeepTable,
    Entry,
    Table,
    array,
    flat,
    kernel,
    linear,
    norm,
    patches,
    qkv_bias,
    qkv_kernel,
)

# Of the standard sizes whose heads are not 64 wide: ViT-H (arXiv 2010.11929), SO400M (2305.13035), ViT-g (2106.04560).
_HEADS = {1280: 16, 1152: 16, 1408: 16}


def usual_heads(weights: Weights, width: int, wanted: int) -> int:
    """Heads of a width, unless they are given; raises RunError where neither is known."""
    heads = wanted or _HEADS.get(width, width // 64)
    if not heads or width % heads:
        raise RunError(
            f"{weights.path}: {width} numbers cannot be split into {heads} heads; set --num_heads or --decoder_heads."
        )
    return heads


def patch_table(path: str, name: str, width: int, patch_size: int) -> Table:
    """The patch embedding, of a convolution whose steps are as long as its kernel."""
    return {
        f"{path}/kernel": patches(f"{name}.weight", width, patch_size),
        f"{path}/bias": array(f"{name}.bias", width),
    }


def channels_first(name: str, shape: tuple[int, ...], axis: int) -> Entry:
    """An array of a layer that reads or draws patches of RGB, or the transpose of its weights.

    What the file has over (channel, row, column) along an axis is over (row, column, channel) here.
    """
    side = math.isqrt(shape[axis] // 3)
    order = np.arange(shape[axis]).reshape(3, side, side).transpose(1, 2, 0).reshape(-1)

    def make(weight: np.ndarray) -> np.ndarray:
        return np.take(weight, order, axis).T

    return Entry((name,), shape, make, lambda value: [np.take(value.T, np.argsort(order), axis)])


def timm_blocks(path: str, name: str, depth: int, width: int, num_heads: int, hidden: int) -> DeepTable:
    """A stack of blocks as timm and Facebook's MAE name them."""
    return stacked(path, timm_block(f"{name}.{{layer}}.", width, num_heads, hidden), depth)


def timm_block(layer: str, width: int, num_heads: int, hidden: int) -> Table:
    """One block of such a stack; `layer` is how the names of its tensors begin, with `{layer}` for its number."""
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
    """A stack of blocks as transformers names those of ViT."""
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


def stacked(path: str, block: Table, depth: int) -> DeepTable:
    """The table of a `Stack` at some path, of that of one layer."""
    return {f"{path}/layers/{name}": (entry, depth) for name, entry in block.items()}


def part(path: str, table: Table, depth: int) -> DeepTable:
    """The table of a part of a model at some path of it; names of tensors begin with the same path."""
    prefix = path.replace("/", ".")
    return {
        f"{path}/{inner}": (dataclasses.replace(entry, names=tuple(f"{prefix}.{name}" for name in entry.names)), depth)
        for inner, entry in table.items()
    }


def single(table: Table) -> DeepTable:
    """The same table, of parameters without layers."""
    return {path: (entry, 1) for path, entry in table.items()}


def grid_of(weights: Weights, name: str, extra: int, axis: int = 1) -> int:
    """Rows of the square grid that a table of positions is for, of which `extra` belong to no patch."""
    count = weights.shape(name)[axis] - extra
    grid = math.isqrt(max(count, 0))
    if not grid or grid**2 != count:
        raise RunError(f"{weights.path}: {name} has {count} positions of patches, which make no square.")
    return grid


def new_grid(image_size: int, patch_size: int, old: int) -> int:
    """Rows of the grid of another image size, or the old one where none is wanted."""
    if image_size % patch_size:
        raise ConfigError(f"--image_size {image_size} must be a multiple of the patches' size, {patch_size}.")
    return image_size // patch_size or old


def positions(name: str, shape: tuple[int, ...], old: int, new: int, *, antialias: bool = False) -> Entry:
    """Positions `[..., extra + N, D]`, resized to another grid but for those that belong to no patch."""
    if old == new:
        return array(name, *shape)
    extra = shape[-2] - old**2

    def make(table: np.ndarray) -> np.ndarray:
        rows = np.asarray(table, np.float32).reshape(-1, shape[-1])
        resized = resize_positions(rows[extra:], new, antialias=antialias)
        return np.concatenate([rows[:extra], resized]).reshape(*shape[:-2], -1, shape[-1])

    return Entry((name,), shape, make)


def resizing(old: int, new: int, *, antialias: bool = False) -> str:
    """What the account says of `positions`."""
    return f"grid of {old} x {old} to {new} x {new}, bicubic{' with antialiasing' if antialias else ''}"
