"""Towers that read an instruction. Axes: B batch, M tokens, D width, E size of an embedding."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from como_jax.runtime_torch.layers import Block, LayerNorm, Linear, run_blocks
from como_jax.spec.towers import TextConfig

BYTE_VOCABULARY = 257
"""Token 0 ends the text, byte b is token b + 1."""
NGRAMS = (3, 4, 5, 6)
NGRAM_ROWS = 4096


class TextFeatures(NamedTuple):
    """Tokens of an instruction `[B, M, D]`, which of them are there, bool `[B, M]`, and one for all `[B, D]`."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class ByteTransformer(nn.Module):
    """A small transformer over bytes, each with the few before it, which are looked up by their hash."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.pool, width = config.pool, config.width
        self.token_embed = nn.Parameter(torch.empty(BYTE_VOCABULARY, width))
        self.ngram_embed = nn.Parameter(torch.empty(len(NGRAMS), NGRAM_ROWS, width))
        self.pos_embed = nn.Parameter(torch.empty(config.max_length, width))
        self.blocks = nn.ModuleList(Block(width, config.num_heads) for _ in range(config.depth))
        self.norm = LayerNorm(width)

    def forward(self, text: Tensor) -> TextFeatures:
        """Features of int32 `[B, M]`: numbers of bytes plus one, and 0 after the text has ended."""
        # The token that ends the text is read too, so that no instruction is without tokens.
        mask = F.pad(text[:, :-1] != 0, (1, 0), value=True)
        ngrams = sum(table[hash_ngrams(text, size)] for table, size in zip(self.ngram_embed, NGRAMS, strict=True))
        x = self.token_embed[text.long()] + ngrams + self.pos_embed[: text.shape[1]]
        x = self.norm(run_blocks(self.blocks, x, mask[:, None]))
        groups = mask.unflatten(1, (-1, self.pool))
        tokens = masked_mean(x.unflatten(1, (-1, self.pool)), groups)
        return TextFeatures(tokens, groups.any(dim=-1), masked_mean(x, mask))


class EmbeddingTower(nn.Module):
    """One token from an embedding that was made beforehand."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.proj = Linear(config.embedding_size, config.width)

    def forward(self, embedding: Tensor) -> TextFeatures:
        """Features of float32 `[B, E]`."""
        x = self.proj(embedding)
        return TextFeatures(x[:, None], x.new_ones((len(x), 1), dtype=torch.bool), x)


class TokenTable(nn.Module):
    """A learned vector for every token, times the root of the width as in Gemma (arXiv 2403.08295)."""

    def __init__(self, config: TextConfig, width: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.vocabulary_size or BYTE_VOCABULARY - 1, width))

    def forward(self, text: Tensor) -> TextFeatures:
        """Features of int32 `[B, M]`: numbers of tokens plus one, and 0 after the text has ended."""
        mask = text > 0
        x = self.table[(text - 1).clamp(min=0).long()] * self.table.shape[1] ** 0.5
        return TextFeatures(x, mask, masked_mean(x, mask))


def hash_ngrams(text: Tensor, size: int) -> Tensor:
    """A row of a table, int64 `[B, M]`, for every token and the `size - 1` before it: a polynomial hash of 32 bits."""
    padded = F.pad(text.long(), (size - 1, 0))
    value = torch.zeros_like(text, dtype=torch.int64)
    for offset in range(size):
        value = (value * 16_777_619 + padded[:, offset : offset + text.shape[1]]) % 2**32
    # The factor less 2^32, so that the product fits into 63 bits; its lowest 32 are the same.
    return value * (2_654_435_769 - 2**32) % 2**32 // (2**32 // NGRAM_ROWS)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean `[..., D]` of the tokens `[..., M, D]` that are there; 0 where there are none."""
    weights = mask.to(x.dtype)[..., None]
    return (x * weights).sum(dim=-2) / weights.sum(dim=-2).clamp(min=1)
