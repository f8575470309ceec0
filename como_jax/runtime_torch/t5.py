"""T5's encoder (arXiv 1910.10683).

Modules are named as in transformers, so that one table of `como_jax.weights` serves public weights and exports. Axes: B
batch, M tokens, D width, H heads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from como_jax.runtime_torch.layers import Linear, run_blocks
from como_jax.runtime_torch.text import TextFeatures, masked_mean
from como_jax.runtime_torch.text_layers import ACTIVATIONS, split_text
from como_jax.spec.towers import GATED, TextConfig


class T5Tower(nn.Module):
    """The encoder of T5 (section 2.1), and of its later versions with gated linear units."""

    in_float32 = ("relative_bias",)
    buckets: Tensor

    def __init__(self, config: TextConfig):
        super().__init__()
        distance = np.arange(config.max_length) - np.arange(config.max_length)[:, None]
        buckets = relative_buckets(distance, config.relative_buckets, config.relative_distance)
        self.register_buffer("buckets", torch.from_numpy(buckets), persistent=False)
        self.shared = nn.Embedding(config.vocabulary_size, config.width)
        blocks = nn.ModuleList(T5Block(config, is_first=layer == 0) for layer in range(config.depth))
        norm = RmsNorm(config.width, config.norm_epsilon)
        self.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": norm})

    @property
    def relative_bias(self) -> nn.Embedding:
        """What every head adds to its logits for a bucket of distances; all layers share that of the first."""
        return self.encoder["block"][0].layer[0]["SelfAttention"].relative_attention_bias

    def forward(self, text: Tensor) -> TextFeatures:
        """Features of int32 `[B, M]`, numbers of tokens plus one; the pooled ones are their mean."""
        tokens, mask = split_text(text)
        length = text.shape[1]
        bias = self.relative_bias(self.buckets[:length, :length]).permute(2, 0, 1)
        hidden = torch.zeros(mask.shape, device=text.device).masked_fill(~mask, torch.finfo(torch.float32).min)
        x = run_blocks(self.encoder["block"], self.shared(tokens), bias + hidden[:, None, None])
        x = self.encoder["final_layer_norm"](x)
        return TextFeatures(x, mask, masked_mean(x, mask))


class T5Block(nn.Module):
    """Pre-norm transformer block without means, biases and a scale of the logits."""

    def __init__(self, config: TextConfig, *, is_first: bool):
        super().__init__()
        parts = {"SelfAttention": T5Attention(config, has_positions=is_first), "DenseReluDense": T5Mlp(config)}
        self.layer = nn.ModuleList(
            nn.ModuleDict({name: part, "layer_norm": RmsNorm(config.width, config.norm_epsilon)})
            for name, part in parts.items()
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`[B, M, D]` to the same; the mask, float32 `[B, H, M, M]`, is added to the logits."""
        attention, mlp = self.layer
        x = x + attention["SelfAttention"](attention["layer_norm"](x), mask)
        return x + mlp["DenseReluDense"](mlp["layer_norm"](x))


class T5Attention(nn.Module):
    """Multi-head self-attention with a bias on its logits, which are not scaled."""

    def __init__(self, config: TextConfig, *, has_positions: bool):
        super().__init__()
        self.num_heads, inner = config.num_heads, config.num_heads * config.head_width
        self.q, self.k, self.v = (Linear(config.width, inner, bias=False) for _ in range(3))
        self.o = Linear(inner, config.width, bias=False)
        if has_positions:
            self.relative_attention_bias = nn.Embedding(config.relative_buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """`[B, M, D]` to the same, softmax in float32; the bias is `[B, H, M, M]`."""
        query, key, value = (
            part(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        weights = ((query @ key.transpose(-2, -1)).float() + bias).softmax(dim=-1).to(value.dtype)
        return self.o((weights @ value).transpose(1, 2).flatten(2))


class T5Mlp(nn.Module):
    """Two layers, of which the first may be a gated linear unit (arXiv 2002.05202)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gated = config.activation.startswith(GATED)
        self.activation = ACTIVATIONS[config.activation.removeprefix(GATED)]
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            self.add_module(name, Linear(config.width, config.mlp_width, bias=False))
        self.wo = Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to the same."""
        return self.wo(self.activation(self.wi_0(x)) * self.wi_1(x) if self.gated else self.activation(self.wi(x)))


class RmsNorm(nn.Module):
    """Scales to unit mean square, in float32."""

    in_float32 = ("weight",)

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to the same."""
        full = x.float()
        full = full * torch.rsqrt(full.square().mean(dim=-1, keepdim=True) + self.epsilon)
        return (full * self.weight).to(x.dtype)


def relative_buckets(distance: np.ndarray, buckets: int, farthest: int) -> np.ndarray:
    """The bucket of every distance from a query to a key (section 2.1), int64 of the same shape.

    Half of the buckets are for keys that follow the query. The first half of either half is for one distance each, the
    rest cover ranges that grow with the logarithm of the distance, up to `farthest`.
    """
    side = buckets // 2
    exact = side // 2
    away = np.abs(distance)
    # In float32, as where public weights were trained: exact powers fall into buckets by its rounding.
    scale = np.float32(np.log(farthest / exact))
    log = np.log(np.maximum(away, exact).astype(np.float32) / np.float32(exact)) / scale
    far = exact + (log * np.float32(side - exact)).astype(np.int64)
    return np.where(distance > 0, side, 0) + np.where(away < exact, away, np.minimum(far, side - 1))
