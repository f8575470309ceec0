"""Layers of LAQ's video transformer (LAPA, arXiv 2410.11758, after C-ViViT of Phenaki, arXiv 2210.02399).

Axes: B batch, T frames, I and J rows and columns of patches, N tokens, M context tokens, D width, H heads, K head size.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from como_jax.runtime_torch.layers import LayerNorm, Linear

# Fixed temperature of cosine attention.
ATTENTION_SCALE = 8.0
NUM_NULL_TOKENS = 2


class CosineAttention(nn.Module):
    """Attention between queries and keys of length one, with a learned scale of every number."""

    in_float32 = ("q_scale", "k_scale")

    def __init__(self, width: int, num_heads: int, head_size: int, num_null: int = 0):
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(width, num_heads * head_size, bias=False)
        self.kv = Linear(width, 2 * num_heads * head_size, bias=False)
        self.proj = Linear(num_heads * head_size, width, bias=False)
        self.q_scale = nn.Parameter(torch.empty(head_size))
        self.k_scale = nn.Parameter(torch.empty(head_size))
        # Something to look at when no context token matters.
        self.null_kv = nn.Parameter(torch.empty(2, num_null, num_heads * head_size)) if num_null else None

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[B, N, D]` from queries `x` of that shape, `context` `[B, M, D]`, and `bias` `[H, N, M]` on the logits."""
        query, (key, value) = self.q(x), self.kv(context).chunk(2, dim=-1)
        if self.null_kv is not None:
            null = self.null_kv[:, None].expand(-1, x.shape[0], -1, -1)
            key, value = torch.cat([null[0], key], dim=1), torch.cat([null[1], value], dim=1)
        query, key, value = (self._split_heads(part) for part in (query, key, value))
        query, key = _unit(query) * self.q_scale, _unit(key) * self.k_scale
        logits = ATTENTION_SCALE * query @ key.transpose(-1, -2)
        if bias is not None:
            logits = logits + bias
        mixed = logits.softmax(dim=-1).to(value.dtype) @ value
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class GatedMlp(nn.Module):
    """GEGLU (arXiv 2002.05202): one half of the hidden layer gates the other."""

    def __init__(self, width: int):
        super().__init__()
        hidden = int(width * 4 * 2 / 3)
        self.fc1, self.fc2 = Linear(width, 2 * hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to the same."""
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.gelu(gate))


class PositionGenerator(nn.Module):
    """PEG (arXiv 2102.10882): a depthwise convolution of 3 x 3 x 3 over time, rows and columns."""

    def __init__(self, width: int, causal: bool):
        super().__init__()
        self.causal = causal
        self.conv = nn.Conv3d(width, width, 3, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, I, J, D]` to the same; a causal one sees two frames back and none ahead."""
        frames = (2, 0) if self.causal else (1, 1)
        channels_first = x.to(self.conv.weight.dtype).movedim(-1, 1)
        return self.conv(F.pad(channels_first, (1, 1, 1, 1, *frames))).movedim(1, -1)


class PositionBias(nn.Module):
    """Continuous position bias (Swin v2, arXiv 2111.09883): an MLP over the logarithms of relative positions."""

    def __init__(self, grid: int, width: int, num_heads: int):
        super().__init__()
        places = np.stack(np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij"), -1).reshape(-1, 2)
        offset = (places[:, None] - places[None]).astype(np.float32)
        scaled = torch.from_numpy(np.sign(offset) * np.log1p(np.abs(offset)))
        self.register_buffer("offset", scaled, persistent=False)
        self.fc1, self.fc2, self.out = Linear(2, width), Linear(width, width), Linear(width, num_heads)

    def forward(self) -> Tensor:
        """Bias on the logits of all patches `[H, I * J, I * J]`, float32."""
        x = F.leaky_relu(self.fc1(self.offset), 0.1)
        return self.out(F.leaky_relu(self.fc2(x), 0.1)).movedim(-1, 0)


class _VideoBlock(nn.Module):
    """What spatial and temporal blocks share: pre-norm attention over some axes, and a gated MLP."""

    def __init__(self, width: int, num_heads: int, head_size: int, *, causal: bool):
        super().__init__()
        self.peg = PositionGenerator(width, causal)
        self.norm1 = LayerNorm(width)
        self.attn = CosineAttention(width, num_heads, head_size)
        self.norm2 = LayerNorm(width)
        self.mlp = GatedMlp(width)


class SpatialBlock(_VideoBlock):
    """Every patch attends to all patches of its frame, and then to context tokens if it is made for them."""

    def __init__(self, width: int, num_heads: int, head_size: int, *, cross: bool = False):
        super().__init__(width, num_heads, head_size, causal=False)
        self.cross_norm = LayerNorm(width) if cross else None
        self.cross_attn = CosineAttention(width, num_heads, head_size, NUM_NULL_TOKENS) if cross else None

    def forward(self, x: Tensor, bias: Tensor, context: Tensor | None = None) -> Tensor:
        """`[B, T, I, J, D]` to the same, from `bias` `[H, I * J, I * J]` and `context` `[B * T, M, D]`."""
        x = x + self.peg(x)
        tokens = x.flatten(2, 3).flatten(0, 1)
        normed = self.norm1(tokens)
        tokens = tokens + self.attn(normed, normed, bias)
        if self.cross_attn is not None and self.cross_norm is not None:
            tokens = tokens + self.cross_attn(self.cross_norm(tokens), context)
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.reshape(x.shape)


class TemporalBlock(_VideoBlock):
    """Every patch attends to the same place in its own and earlier frames."""

    def __init__(self, width: int, num_heads: int, head_size: int):
        super().__init__(width, num_heads, head_size, causal=True)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, I, J, D]` to the same."""
        frames, rows, columns = x.shape[1:4]
        x = x + self.peg(x)
        tokens = x.movedim(1, 3).flatten(0, 2)
        normed = self.norm1(tokens)
        future = torch.full((frames, frames), torch.finfo(torch.float32).min, device=x.device).triu(1)
        tokens = tokens + self.attn(normed, normed, future)
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.unflatten(0, (-1, rows, columns)).movedim(3, 1)


def _unit(x: Tensor) -> Tensor:
    """Float32 vectors of length one along the last axis; 0 stays 0."""
    x = x.float()
    return x * x.square().sum(dim=-1, keepdim=True).clamp(min=1e-12).rsqrt()
