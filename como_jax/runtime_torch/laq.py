"""LAQ, latent action quantisation: stage 1 of LAPA (arXiv 2410.11758).

Axes: B batch, T instants, P = T - 1 pairs, I and J rows and columns of patches, D width, Q latent actions of a pair,
L latent size of one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from como_jax.runtime_torch.bottlenecks import Codebook
from como_jax.runtime_torch.laq_layers import PositionBias, SpatialBlock, TemporalBlock
from como_jax.runtime_torch.layers import LayerNorm, Linear, patchify, unpatchify
from como_jax.spec.motion import LaqConfig


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
