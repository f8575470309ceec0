"""LAQ, latent action quantisation: stage 1 of LAPA (arXiv 2410.11758), after C-ViViT of Phenaki (arXiv 2210.02399).

Axes: B batch, T instants, P = T - 1 pairs, I and J rows and columns of patches, N tokens, M context tokens, D width,
H heads, K head size, Q latent actions of a pair, L latent size of one.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from como_jax.runtime_torch.bottlenecks import Codebook
from como_jax.runtime_torch.layers import LayerNorm, Linear, patchify, unpatchify
from como_jax.spec.motion import LaqConfig

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
        # Learned tokens to attend to when no context token matters.
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


class Pool(nn.Module):
    """A convolution of three by three with stride two, as a linear layer over (row, column, channel).

    Unlike cuDNN's it computes in full float32, on which the choice of a code depends.
    """

    def __init__(self, width: int):
        super().__init__()
        self.linear = Linear(9 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, I, J, L]` to `[B, I / 2, J / 2, L]`."""
        rows, columns = x.shape[1], x.shape[2]
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))
        near = [
            padded[:, row : row + rows : 2, column : column + columns : 2] for row in range(3) for column in range(3)
        ]
        return self.linear(torch.cat(near, dim=-1))


class Laq(nn.Module):
    """The quantised motion model of LAPA."""

    in_float32 = ("position_bias", "latent_in", "pool1", "pool2", "bottleneck", "decoder_norm", "head")

    def __init__(self, image_size: int, config: LaqConfig):
        super().__init__()
        self.image_size, self.patch_size = image_size, config.patch_size
        self.grid, width, pixels = image_size // config.patch_size, config.width, config.patch_size**2 * 3
        sizes = (width, config.num_heads, config.head_size)
        self.patch_norm = LayerNorm(pixels)
        self.patch_embed = Linear(pixels, width)
        self.embed_norm = LayerNorm(width)
        self.position_bias = PositionBias(self.grid, width, config.num_heads)
        self.spatial = nn.ModuleList(SpatialBlock(*sizes) for _ in range(config.spatial_depth))
        self.spatial_norm = LayerNorm(width)
        self.temporal = nn.ModuleList(TemporalBlock(*sizes) for _ in range(config.temporal_depth))
        self.temporal_norm = LayerNorm(width)
        self.latent_in = Linear(width, config.latent_dim)
        self.pool1, self.pool2 = Pool(config.latent_dim), Pool(config.latent_dim)
        self.bottleneck = Codebook(config.latent_dim, config.codebook_size)
        self.latent_out = Linear(config.latent_dim, width)
        self.decoder = nn.ModuleList(SpatialBlock(*sizes, cross=True) for _ in range(config.decoder_depth))
        self.decoder_norm = LayerNorm(width)
        self.head = Linear(width, pixels)

    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Latent actions `[B, P, Q, L]` and codes `[B, P, Q]` between frames of uint8 `[B, T, H, W, 3]`."""
        return self.bottleneck(self.infer(frames))

    def infer(self, frames: Tensor) -> Tensor:
        """What is quantised, `[B, P, Q, L]`, for frames of uint8 `[B, T, H, W, 3]`."""
        images = _pixels(frames)
        pairs = torch.stack([images[:, :-1], images[:, 1:]], dim=2)
        return self._change(self._embed(pairs.flatten(0, 1))).unflatten(0, pairs.shape[:2])

    def predict(self, frames: Tensor, latent: Tensor) -> Tensor:
        """The frames, float32 in [0, 1], that follow uint8 `[B, H, W, 3]` under latents `[B, Q, L]`."""
        tokens, context, bias = self._embed(_pixels(frames)[:, None]), self.latent_out(latent), self.position_bias()
        for block in self.decoder:
            tokens = block(tokens, bias, context)
        patches = self.head(self.decoder_norm(tokens)).flatten(1, 3)
        return unpatchify(patches, self.patch_size, self.image_size).clamp(0.0, 1.0)

    def _change(self, tokens: Tensor) -> Tensor:
        """The change of the pooled tokens, `[B, Q, L]`, from patch tokens `[B, 2, I, J, D]` of both frames."""
        bias = self.position_bias()
        for block in self.spatial:
            tokens = block(tokens, bias)
        tokens = self.spatial_norm(tokens)
        for block in self.temporal:
            tokens = block(tokens)
        grid = self.latent_in(self.temporal_norm(tokens)).flatten(0, 1)
        pooled = self.pool2(F.relu(self.pool1(grid))).flatten(1, 2).unflatten(0, (-1, 2))
        return pooled[:, 1] - pooled[:, 0]

    def _embed(self, images: Tensor) -> Tensor:
        """Patch tokens `[B, T, I, J, D]` of images `[B, T, H, W, 3]`."""
        patches = patchify(images.flatten(0, 1), self.patch_size)
        tokens = self.embed_norm(self.patch_embed(self.patch_norm(patches)))
        return tokens.reshape(*images.shape[:2], self.grid, self.grid, -1)


def _pixels(frames: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1], the range of LAPA's released model."""
    return frames.float() / 255.0
