"""Towers that read an instruction: bytes, embeddings, a table of tokens, and the encoders of CLIP and T5.

CLIP (arXiv 2103.00020) and T5 (arXiv 1910.10683) are named as in transformers, so that one table of `como_jax.weights`
serves public weights and exports. They are not taken from transformers itself: its T5 cannot compute in bfloat16 with
norms in float32, as training does, and the names of its CLIP changed from one version to the next. Axes: B batch,
M tokens, D width, E size of an embedding, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from como_jax.runtime_torch.layers import Block, LayerNorm, Linear, attend, run_blocks
from como_jax.spec.towers import BYTE_VOCABULARY, GATED, NGRAM_ROWS, NGRAMS, TextConfig


class TextFeatures(NamedTuple):
    """Tokens of an instruction `[B, M, D]`, a mask, False at padding, `[B, M]`, and one vector for all `[B, D]`."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class ByteTransformer(nn.Module):
    """A small transformer over bytes; every byte is embedded with the n-grams that end in it, found by their hash."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.pool, width = config.pool, config.width
        self.token_embed = nn.Parameter(torch.empty(BYTE_VOCABULARY, width))
        self.ngram_embed = nn.Parameter(torch.empty(len(NGRAMS), NGRAM_ROWS, width))
        self.pos_embed = nn.Parameter(torch.empty(config.max_length, width))
        self.blocks = nn.ModuleList(Block(width, config.num_heads) for _ in range(config.depth))
        self.norm = LayerNorm(width)

    def forward(self, text: Tensor) -> TextFeatures:
        """Features of int32 `[B, M]`: bytes plus one, 0 after the end of the text."""
        # The token that ends the text is read too, so that even an empty instruction has a token.
        mask = F.pad(text[:, :-1] != 0, (1, 0), value=True)
        ngrams = sum(table[hash_ngrams(text, size)] for table, size in zip(self.ngram_embed, NGRAMS, strict=True))
        x = self.token_embed[text.long()] + ngrams + self.pos_embed[: text.shape[1]]
        x = self.norm(run_blocks(self.blocks, x, mask[:, None]))
        groups = mask.unflatten(1, (-1, self.pool))
        tokens = masked_mean(x.unflatten(1, (-1, self.pool)), groups)
        return TextFeatures(tokens, groups.any(dim=-1), masked_mean(x, mask))


class EmbeddingTower(nn.Module):
    """One token from a precomputed embedding."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.proj = Linear(config.embedding_size, config.width)

    def forward(self, embedding: Tensor) -> TextFeatures:
        """Features of float32 `[B, E]`."""
        x = self.proj(embedding)
        return TextFeatures(x[:, None], x.new_ones((len(x), 1), dtype=torch.bool), x)


class TokenTable(nn.Module):
    """A learned vector for every token, multiplied by the root of the width as in Gemma (arXiv 2403.08295)."""

    def __init__(self, config: TextConfig, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.vocabulary_size or BYTE_VOCABULARY - 1, width))

    def forward(self, text: Tensor) -> TextFeatures:
        """Features of int32 `[B, M]`: token ids plus one, 0 after the end of the text."""
        mask = text > 0
        x = self.table[(text - 1).clamp(min=0).long()] * self.table.shape[1] ** 0.5
        return TextFeatures(x, mask, masked_mean(x, mask))


def hash_ngrams(text: Tensor, size: int) -> Tensor:
    """A row of a table, int64 `[B, M]`, for every token and the `size - 1` before it: a polynomial hash of 32 bits."""
    padded = F.pad(text.long(), (size - 1, 0))
    value = torch.zeros_like(text, dtype=torch.int64)
    for offset in range(size):
        value = (value * 16_777_619 + padded[:, offset : offset + text.shape[1]]) % 2**32
    # 2^32 is subtracted from the factor so that the product fits into 63 bits; its lowest 32 bits do not change.
    return value * (2_654_435_769 - 2**32) % 2**32 // (2**32 // NGRAM_ROWS)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean `[..., D]` of the tokens `[..., M, D]` that the mask keeps; 0 where it keeps none."""
    weights = mask.to(x.dtype)[..., None]
    return (x * weights).sum(dim=-2) / weights.sum(dim=-2).clamp(min=1)


# Named as in the config.json of public weights.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def split_text(text: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids, int64 `[B, M]`, and a mask that is False at padding; the first token is never padding.

    Args:
      text: int32 `[B, M]`, token ids plus one, 0 after the end, so that token 0 can be told from padding.
    """
    return (text.long() - 1).clamp(min=0), F.pad(text[:, 1:] != 0, (1, 0), value=True)


class ClipTextTower(nn.Module):
    """A causal transformer; the output at the last token stands for the whole text."""

    def __init__(self, config: TextConfig):
        super().__init__()
        width = config.width
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(config.vocabulary_size, width),
                "position_embedding": nn.Embedding(config.num_positions, width),
            }
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(ClipBlock(config) for _ in range(config.depth))})
        self.final_layer_norm = LayerNorm(width, config.norm_epsilon)

    def forward(self, text: Tensor) -> TextFeatures:
        """Features of int32 `[B, M]`, token ids plus one; the pooled vector is that of the last token."""
        tokens, mask = split_text(text)
        length = text.shape[1]
        x = self.embeddings["token_embedding"](tokens) + self.embeddings["position_embedding"].weight[:length]
        # The causal mask hides the padding from the text.
        causal = torch.ones(1, length, length, dtype=torch.bool, device=x.device).tril()
        x = self.final_layer_norm(run_blocks(self.encoder["layers"], x, causal))
        last = mask.sum(dim=1) - 1
        return TextFeatures(x, mask, x.take_along_dim(last[:, None, None], dim=1)[:, 0])


class ClipBlock(nn.Module):
    """Pre-norm transformer block with CLIP's activation and epsilon."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width, config.norm_epsilon)
        self.self_attn = ClipAttention(config.width, config.num_heads)
        self.layer_norm2 = LayerNorm(config.width, config.norm_epsilon)
        self.mlp = ClipMlp(config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`[B, M, D]` to the same; a mask, bool, is broadcast to `[B, M, M]`."""
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class ClipAttention(nn.Module):
    """Multi-head self-attention with layers of their own for queries, keys and values."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """See `ClipBlock`."""
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.num_heads, mask))


class ClipMlp(nn.Module):
    """Two layers with the config's activation between them."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.fc1, self.fc2 = Linear(config.width, config.mlp_width), Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to the same."""
        return self.fc2(self.activation(self.fc1(x)))


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
        """What every head adds to its logits for a bucket of distances; all layers share that of the first layer."""
        return self.encoder["block"][0].layer[0]["SelfAttention"].relative_attention_bias

    def forward(self, text: Tensor) -> TextFeatures:
        """Features of int32 `[B, M]`, token ids plus one; the pooled vector is their mean."""
        tokens, mask = split_text(text)
        length = text.shape[1]
        bias = self.relative_bias(self.buckets[:length, :length]).permute(2, 0, 1)
        hidden = torch.zeros(mask.shape, device=text.device).masked_fill(~mask, torch.finfo(torch.float32).min)
        x = run_blocks(self.encoder["block"], self.shared(tokens), bias + hidden[:, None, None])
        x = self.encoder["final_layer_norm"](x)
        return TextFeatures(x, mask, masked_mean(x, mask))


class T5Block(nn.Module):
    """Pre-norm transformer block with RMS norms, without biases, and without a scale of the logits."""

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
    # In float32, as public weights were trained: the rounding decides the bucket of exact powers.
    scale = np.float32(np.log(farthest / exact))
    log = np.log(np.maximum(away, exact).astype(np.float32) / np.float32(exact)) / scale
    far = exact + (log * np.float32(side - exact)).astype(np.int64)
    return np.where(distance > 0, side, 0) + np.where(away < exact, away, np.minimum(far, side - 1))
