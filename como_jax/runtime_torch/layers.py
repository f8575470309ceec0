"""Transformer building blocks. Axes: B batch, N tokens, D width.

A linear layer casts its input to the dtype of its own weights, which `set_compute_dtype` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from como_jax.spec.images import IMAGENET_MEAN, IMAGENET_STD


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts all parameters except those that training keeps in float32: layer norms, and the modules' `in_float32`."""
    kept: set[int] = set()
    for module in model.modules():
        for name in getattr(module, "in_float32", ()):
            part = getattr(module, name)
            kept.update(map(id, part.parameters() if isinstance(part, nn.Module) else [part]))
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in kept:
                continue
            if isinstance(module, LayerNorm):
                module.output_dtype = dtype
            else:
                parameter.data = parameter.data.to(dtype)


def normalize_frames(frames: Tensor) -> Tensor:
    """uint8 RGB `[..., 3]` to ImageNet-normalised float32."""
    mean, std = _statistics(frames.device)
    return frames.float() * (1.0 / (255.0 * std)) - mean / std


def denormalize_frames(frames: Tensor) -> Tensor:
    """ImageNet-normalised RGB `[..., 3]` to float32 in [0, 1], clipped."""
    mean, std = _statistics(frames.device)
    return (frames * std + mean).clamp(0.0, 1.0)


def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.tensor(IMAGENET_MEAN, device=device), torch.tensor(IMAGENET_STD, device=device)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """`[B, H, W, C]` to row-major patches `[B, (H/p)(W/p), p * p * C]`, each in (row, column, channel) order."""
    _, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(-1, rows, patch_size, columns, patch_size, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, patch_size * patch_size * channels)


def unpatchify(patches: Tensor, patch_size: int, size: int) -> Tensor:
    """Inverse of `patchify`: `[B, N, p * p * C]` to square `[B, size, size, C]`."""
    grid = size // patch_size
    x = patches.reshape(-1, grid, grid, patch_size, patch_size, patches.shape[-1] // patch_size**2)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, size, size, x.shape[-1])


class Linear(nn.Linear):
    """A linear layer in the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32, with the epsilon of ViT and MAE; only its output has the compute dtype."""

    def __init__(self, width: int, epsilon: float = 1e-6):
        super().__init__(width, eps=epsilon)
        self.output_dtype = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to the same."""
        normed = F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.to(self.output_dtype)


class Attention(nn.Module):
    """Multi-head self-attention, optionally computed for the first tokens only."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, num_outputs: int | None = None, mask: Tensor | None = None) -> Tensor:
        """`[B, N, D]` to `[B, num_outputs or N, D]`; every output attends to all N tokens, or as the mask allows.

        The mask is bool, broadcast to `[B, outputs, N]`, with a True in every row.
        """
        width, weight, bias = x.shape[-1], self.qkv.weight, self.qkv.bias
        x = x.to(weight.dtype)
        query = F.linear(x[:, :num_outputs], weight[:width], bias[:width])
        key, value = F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
        return self.proj(attend(query, key, value, self.num_heads, mask))


class CrossAttention(nn.Module):
    """Multi-head attention from tokens to a context of the same width."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = Linear(width, width), Linear(width, 2 * width), Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[B, N, D]` to the same; a mask, bool, is broadcast to `[B, N, M]` for a context `[B, M, D]`."""
        key, value = self.kv(context).chunk(2, dim=-1)
        return self.proj(attend(self.q(x), key, value, self.num_heads, mask))


def attend(query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention of several heads: `[B, N, D]` over `[B, M, D]` to `[B, N, D]`."""
    parts = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (query, key, value))
    mixed = F.scaled_dot_product_attention(*parts, attn_mask=None if mask is None else mask[:, None])
    return mixed.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two layers with a GELU between them, exact or by its tanh approximation."""

    def __init__(self, width: int, hidden: int, *, tanh_gelu: bool = False):
        super().__init__()
        self.fc1, self.fc2 = Linear(width, hidden), Linear(hidden, width)
        self.approximate = "tanh" if tanh_gelu else "none"

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to the same."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Block(nn.Module):
    """Pre-norm transformer block; an `mlp_width` of 0 is four times the width."""

    def __init__(self, width: int, num_heads: int, mlp_width: int = 0, *, tanh_gelu: bool = False):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, num_heads)
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, mlp_width or 4 * width, tanh_gelu=tanh_gelu)

    def forward(self, x: Tensor, num_outputs: int | None = None, mask: Tensor | None = None) -> Tensor:
        """`[B, N, D]` to `[B, num_outputs or N, D]`; see `Attention`."""
        x = x[:, :num_outputs] + self.attn(self.norm1(x), num_outputs, mask)
        return x + self.mlp(self.norm2(x))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Applies one block after another to tokens `[B, N, D]`; see `Attention` for the mask."""
    for block in blocks:
        x = block(x) if mask is None else block(x, mask=mask)
    return x
