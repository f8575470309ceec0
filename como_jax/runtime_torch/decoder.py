"""A decoder-only transformer laid out as Gemma (arXiv 2403.08295).

Grouped-query attention, rotary positions, RMS norm and a gated MLP. Axes: B batch, N tokens, S tokens so far, D width,
H query heads, G key-value heads, K head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from como_jax.runtime_torch.layers import Linear
from como_jax.spec.towers import DecoderConfig

KeyValues = tuple[Tensor, Tensor]
"""Keys and values of the tokens so far, `[B, G, S, K]` each."""


class RmsNorm(nn.Module):
    """Scales to unit mean square, in float32; the parameter is the scale minus one, as in Gemma."""

    in_float32 = ("scale",)

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to the same."""
        full = x.float()
        full = full * torch.rsqrt(full.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return (full * (1 + self.scale)).to(x.dtype)


class Projection(Linear):
    """A linear map without bias, with a low-rank change of it where it was trained so (LoRA, arXiv 2106.09685)."""

    def __init__(self, inputs: int, outputs: int, config: DecoderConfig):
        super().__init__(inputs, outputs, bias=False)
        rank = config.lora_rank
        self.lora_scale = config.lora_alpha / rank if rank else 0.0
        if rank:
            self.lora_a = nn.Parameter(torch.empty(rank, inputs))
            self.lora_b = nn.Parameter(torch.empty(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`."""
        out = super().forward(x)
        if not self.lora_scale:
            return out
        return out + self.lora_scale * F.linear(F.linear(x.to(self.lora_a.dtype), self.lora_a), self.lora_b)


class GroupedAttention(nn.Module):
    """Attention whose heads share keys and values in groups."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_size, self.rope_period = config.head_size, config.rope_period
        heads, shared = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.q = Projection(config.width, heads, config)
        self.k, self.v = Projection(config.width, shared, config), Projection(config.width, shared, config)
        self.proj = Projection(heads, config.width, config)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, cache: KeyValues | None) -> tuple[Tensor, KeyValues]:
        """`[B, N, D]` to the same, and the keys and values of all tokens so far."""
        query, key, value = (self._split(part(x)) for part in (self.q, self.k, self.v))
        query, key = (rotate(part, positions, self.rope_period) for part in (query, key))
        if cache is not None:
            key, value = (torch.cat(parts, dim=2) for parts in zip(cache, (key, value), strict=True))
        groups = query.shape[1] // key.shape[1]
        shared = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        mixed = F.scaled_dot_product_attention(query, *shared, attn_mask=mask[:, None])
        return self.proj(mixed.transpose(1, 2).flatten(2)), (key, value)

    def _split(self, x: Tensor) -> Tensor:
        """`[B, N, H * K]` to `[B, H, N, K]`."""
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


class GatedMlp(nn.Module):
    """GELU of one linear map times another, mapped back."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate = Projection(config.width, config.mlp_width, config)
        self.up = Projection(config.width, config.mlp_width, config)
        self.down = Projection(config.mlp_width, config.width, config)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to the same."""
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class DecoderBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.norm1, self.attn = RmsNorm(config.width, config.norm_epsilon), GroupedAttention(config)
        self.norm2, self.mlp = RmsNorm(config.width, config.norm_epsilon), GatedMlp(config)

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor, cache: KeyValues | None) -> tuple[Tensor, KeyValues]:
        """See `GroupedAttention`."""
        attended, cache = self.attn(self.norm1(x), positions, mask, cache)
        x = x + attended
        return x + self.mlp(self.norm2(x)), cache


class Decoder(nn.Module):
    """The stack of blocks and the last norm; embedding and heads are those of whoever uses it."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.norm = RmsNorm(config.width, config.norm_epsilon)

    def forward(
        self, x: Tensor, positions: Tensor, mask: Tensor, cache: list[KeyValues] | None = None
    ) -> tuple[Tensor, list[KeyValues]]:
        """`[B, N, D]` to the same, and keys and values of all layers.

        Args:
          x: embedded tokens.
          positions: int64 `[B, N]`.
          mask: bool `[B, N, S]`, which tokens each reads, those of the cache first; every row has a True.
          cache: of earlier tokens, or None.
        """
        # In the compute dtype from the start, as in training.
        x, found = x.to(self.blocks[0].attn.q.weight.dtype) if len(self.blocks) else x, []
        for layer, block in enumerate(self.blocks):
            x, state = block(x, positions, mask, cache[layer] if cache is not None else None)
            found.append(state)
        return self.norm(x), found


def rotate(x: Tensor, positions: Tensor, period: float) -> Tensor:
    """Rotary positions (arXiv 2104.09864): `[B, H, N, K]`, the first half of the numbers paired with the second."""
    half = x.shape[-1] // 2
    frequencies = period ** (-torch.arange(half, device=x.device) / half)
    angles = positions[:, None, :, None] * frequencies
    sine, cosine = torch.sin(angles), torch.cos(angles)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)
