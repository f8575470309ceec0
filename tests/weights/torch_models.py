"""Small models of other projects in plain PyTorch functions: random tensors by name, and what they compute."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from como_jax.nn.layers import sincos_position_embedding

Tensors = dict[str, torch.Tensor]

# No two sizes are alike, so that no tensor fits where it does not belong.
IMAGE, PATCH, WIDTH, HEADS, DEPTH = 20, 5, 24, 3, 2
DECODER_WIDTH, DECODER_HEADS, DECODER_DEPTH = 16, 2, 1
GRID = IMAGE // PATCH


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    """Normal numbers: kernels keep the size of what passes them, scales are about 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        value = torch.randn(shape, generator=generator)
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma", "scale")):
            return 1 + 0.2 * value
        return value * (0.3 if len(shape) < 2 else max(1, value[0].numel()) ** -0.5)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def vit_shapes(name: str, width: int, depth: int) -> dict[str, tuple[int, ...]]:
    """A stack of blocks as timm names them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in (f"{name}.{number}." for number in range(depth)):
        shapes |= {f"{layer}{norm}.{end}": (width,) for norm in ("norm1", "norm2") for end in ("weight", "bias")}
        for part, outputs, inputs in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {f"{layer}{part}.weight": (outputs, inputs), f"{layer}{part}.bias": (outputs,)}
    return shapes


def mae(*, decoder: bool = True, image_size: int = IMAGE) -> Tensors:
    """An MAE as its authors save it."""
    grid, pixels = image_size // PATCH, PATCH**2 * 3
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        **vit_shapes("blocks", WIDTH, DEPTH),
    }
    if decoder:
        shapes |= {
            "decoder_embed.weight": (DECODER_WIDTH, WIDTH),
            "decoder_embed.bias": (DECODER_WIDTH,),
            "mask_token": (1, 1, DECODER_WIDTH),
            "decoder_norm.weight": (DECODER_WIDTH,),
            "decoder_norm.bias": (DECODER_WIDTH,),
            "decoder_pred.weight": (pixels, DECODER_WIDTH),
            "decoder_pred.bias": (pixels,),
            **vit_shapes("decoder_blocks", DECODER_WIDTH, DECODER_DEPTH),
        }
    tensors = random_tensors(shapes)
    tensors["pos_embed"] = sincos(grid, WIDTH)
    return tensors | ({"decoder_pos_embed": sincos(grid, DECODER_WIDTH)} if decoder else {})


def sincos(grid: int, width: int) -> torch.Tensor:
    """MAE's positions, of which the class token's are 0."""
    return torch.tensor(np.pad(sincos_position_embedding(grid, grid, width), ((1, 0), (0, 0))))[None]


_HUGGINGFACE = (
    (r"^decoder_blocks", "decoder.decoder_layers"),
    (r"^mask_token", "decoder.mask_token"),
    (r"^decoder_(embed|norm|pred|pos_embed)", r"decoder.decoder_\1"),
    (r"^blocks", "vit.encoder.layer"),
    (r"^(cls_token)", r"vit.embeddings.\1"),
    (r"^pos_embed", "vit.embeddings.position_embeddings"),
    (r"^patch_embed.proj", "vit.embeddings.patch_embeddings.projection"),
    (r"^norm", "vit.layernorm"),
    (r"\.norm1", ".layernorm_before"),
    (r"\.norm2", ".layernorm_after"),
    (r"attn\.proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
)


def as_huggingface(tensors: Tensors) -> Tensors:
    """The same MAE, or stack of blocks, as transformers saves it."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, replacement in _HUGGINGFACE:
            name = re.sub(pattern, replacement, name)
        if "attn.qkv" in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
            found |= {name.replace("attn.qkv", f"attention.attention.{part}"): value for part, value in parts}
        else:
            found[name] = tensor
    return found


def norm(x: torch.Tensor, tensors: Tensors, name: str, epsilon: float = 1e-6) -> torch.Tensor:
    """Layer norm."""
    return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], epsilon)


def linear(x: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
    """A linear layer, with a bias if there is one."""
    return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def blocks(x: torch.Tensor, tensors: Tensors, name: str, depth: int, heads: int, epsilon: float = 1e-6) -> torch.Tensor:
    """Pre-norm blocks under timm's names."""
    for layer in (f"{name}.{number}." for number in range(depth)):
        qkv = linear(norm(x, tensors, f"{layer}norm1", epsilon), tensors, f"{layer}attn.qkv")
        query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + linear(mixed, tensors, f"{layer}attn.proj")
        hidden = F.gelu(linear(norm(x, tensors, f"{layer}norm2", epsilon), tensors, f"{layer}mlp.fc1"))
        x = x + linear(hidden, tensors, f"{layer}mlp.fc2")
    return x


def patches(images: torch.Tensor, tensors: Tensors, name: str) -> torch.Tensor:
    """Embedded patches `[B, N, D]` of images `[B, H, W, 3]`."""
    kernel = tensors[f"{name}.weight"]
    embedded = F.conv2d(images.permute(0, 3, 1, 2), kernel, tensors[f"{name}.bias"], stride=kernel.shape[-1])
    return embedded.flatten(2).transpose(1, 2)


def encode(images: Any, tensors: Tensors, epsilon: float = 1e-6) -> torch.Tensor:
    """Features `[B, 1 + N, D]` of the encoder of `mae`, of images `[B, H, W, 3]`, in the places of their patches."""
    x = patches(torch.as_tensor(images), tensors, "patch_embed.proj")
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x], dim=1) + tensors["pos_embed"]
    return norm(blocks(x, tensors, "blocks", DEPTH, HEADS, epsilon), tensors, "norm", epsilon)


def decode(features: torch.Tensor, tensors: Tensors) -> torch.Tensor:
    """Patches that the decoder of `mae` draws where nothing is masked."""
    x = linear(features, tensors, "decoder_embed") + tensors["decoder_pos_embed"]
    x = blocks(x, tensors, "decoder_blocks", DECODER_DEPTH, DECODER_HEADS)
    return linear(norm(x, tensors, "decoder_norm")[:, 1:], tensors, "decoder_pred")


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference, as a share of the largest number."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())
