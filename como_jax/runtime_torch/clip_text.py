"""CLIP's text encoder (arXiv 2103.00020).

Modules are named as in transformers, so that one table of `como_jax.weights` serves public weights and exports. Axes: B
batch, M tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from como_jax.runtime_torch.layers import LayerNorm, Linear, attend, run_blocks
from como_jax.runtime_torch.text import TextFeatures
from como_jax.runtime_torch.text_layers import ACTIVATIONS, split_text
from como_jax.spec.towers import TextConfig


class ClipTextTower(nn.Module):
    """A causal transformer, read at the end of the text."""

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
        """Features of int32 `[B, M]`, numbers of tokens plus one; the pooled ones are those of the last token."""
        tokens, mask = split_text(text)
        length = text.shape[1]
        x = self.embeddings["token_embedding"](tokens) + self.embeddings["position_embedding"].weight[:length]
        # What follows the end is hidden from the text by the causal mask.
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
