"""CoMo's train step in plain PyTorch, for comparison: frozen ViT, temporal difference, Q-former, FDM, pixel error.

It is written without any thought of speed but what PyTorch itself offers: fused attention, a fused AdamW, autocast,
`torch.compile`. Each frame is encoded once, without gradients. Run by `tools.benchmarks.peer_torch_step`;
needs torch, and imports nothing of JAX, so that neither library disturbs the other.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from absl import flags
from ml_collections import ConfigDict, config_flags
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from como_jax import cli
from como_jax.files import write_figures
from tools.benchmarks.memory import peak_resident_bytes

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, num_heads), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _blocks(width: int, depth: int, num_heads: int) -> nn.Sequential:
    return nn.Sequential(*(Block(width, num_heads) for _ in range(depth)))


class Vit(nn.Module):
    """The encoder, with a class token."""

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, num_heads: int):
        super().__init__()
        self.patch_size = patch_size
        self.patch_embed = nn.Linear(patch_size**2 * 3, width)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (image_size // patch_size) ** 2, width))
        self.blocks, self.norm = _blocks(width, depth, num_heads), nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor) -> Tensor:
        """`[B, 1 + N, D]` of images `[B, H, W, 3]`."""
        patches = self.patch_embed(patchify(images, self.patch_size))
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))


class InverseDynamics(nn.Module):
    """The motion Q-former, all of whose layers compute all tokens."""

    def __init__(self, num_tokens: int, feature_width: int, model: ConfigDict):
        super().__init__()
        width, self.num_queries = model.idm_width, model.num_queries

        def embedding(tokens: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.randn(1, tokens, width))

        self.input_proj = nn.Linear(feature_width, width)
        self.queries, self.separator = embedding(model.num_queries), embedding(1)
        self.condition_type, self.motion_type = embedding(1), embedding(1)
        self.pos_embed = embedding(model.num_queries + 2 * num_tokens + 1)
        self.blocks, self.norm = _blocks(width, model.idm_depth, model.idm_heads), nn.LayerNorm(width, eps=1e-6)
        self.latent_hidden, self.latent_out = nn.Linear(width, width), nn.Linear(width, model.latent_dim)

    def forward(self, condition: Tensor, motion: Tensor) -> Tensor:
        """Latent motion `[B, Q, L]` of features `[B, N, D]`."""
        condition = self.input_proj(condition) + self.condition_type
        motion = self.input_proj(motion) + self.motion_type
        queries, separator = (token.expand(len(motion), -1, -1) for token in (self.queries, self.separator))
        x = self.blocks(torch.cat([queries, condition, separator, motion], dim=1) + self.pos_embed)
        return self.latent_out(torch.tanh(self.latent_hidden(self.norm(x[:, : self.num_queries]))))


class ForwardDynamics(nn.Module):
    """A ViT on the current frame's patches, to each of which the latent motion is added."""

    def __init__(self, image_size: int, model: ConfigDict):
        super().__init__()
        width, pixels = model.fdm_width, model.fdm_patch_size**2 * 3
        self.patch_size = model.fdm_patch_size
        self.patch_embed = nn.Linear(pixels, width)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, (image_size // self.patch_size) ** 2, width))
        self.latent_up, self.latent_pool = (
            nn.Linear(model.latent_dim, width),
            nn.Linear(model.num_queries * width, width),
        )
        self.blocks, self.norm = _blocks(width, model.fdm_depth, model.fdm_heads), nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, pixels)

    def forward(self, images: Tensor, latent: Tensor) -> Tensor:
        """Patches `[B, M, p * p * 3]` of the next images."""
        motion = self.latent_pool(self.latent_up(latent).flatten(1))
        x = self.patch_embed(patchify(images, self.patch_size)) + self.pos_embed + motion[:, None]
        return self.head(self.norm(self.blocks(x)))


class Como(nn.Module):
    """The motion model of a config of `tools.benchmarks.peer_torch_step`, and its loss."""

    def __init__(self, config: ConfigDict):
        super().__init__()
        encoder, size = config.encoder, config.data.image_size
        self.encoder = Vit(size, encoder.patch_size, encoder.width, encoder.depth, encoder.num_heads)
        self.encoder.requires_grad_(False)
        self.idm = InverseDynamics(1 + (size // encoder.patch_size) ** 2, encoder.width, config.model)
        self.fdm = ForwardDynamics(size, config.model)

    def forward(self, frames: Tensor) -> Tensor:
        """The pixel error of uint8 pairs `[B, 2, H, W, 3]`."""
        mean, std = (torch.tensor(values, device=frames.device) for values in (_MEAN, _STD))
        images = (frames.float() / 255 - mean) / std
        with torch.no_grad():
            # The encoder may be kept in bfloat16, which nothing learns from.
            features = self.encoder(images.flatten(0, 1).to(self.encoder.pos_embed.dtype))
            now, later = features.unflatten(0, frames.shape[:2]).unbind(1)
        drawn = self.fdm(images[:, 0], self.idm(now, later - now))
        return F.mse_loss(drawn.float(), patchify(images[:, 1], self.fdm.patch_size))


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """`[B, H, W, C]` to row-major patches `[B, N, p * p * C]`."""
    batch, height, width, channels = images.shape
    x = images.view(batch, height // patch_size, patch_size, width // patch_size, patch_size, channels)
    return x.transpose(2, 3).reshape(batch, -1, patch_size**2 * channels)


def load_arrays(model: Como, arrays: Mapping[str, np.ndarray]) -> None:
    """Loads parameters of the JAX model by their paths; raises if one is missing or left over."""
    state: dict[str, Tensor] = {}
    for path, array in arrays.items():
        prefix, stacked, rest = path.partition("blocks/layers/")
        layers = enumerate(array) if stacked else [(None, array)]
        for number, layer in layers:
            name = path if number is None else f"{prefix}blocks/{number}/{rest}"
            module, _, kind = name.replace("/", ".").rpartition(".")
            if kind == "kernel":
                # Heads are axes of their own: of the output of qkv, of the input of proj.
                inputs = layer.shape[0] if not module.endswith("attn.proj") else layer.shape[0] * layer.shape[1]
                state[f"{module}.weight"] = torch.tensor(layer.reshape(inputs, -1).T)
            else:
                key = f"{module}.weight" if kind == "scale" else f"{module}.{kind}"
                flat = layer.reshape(-1) if kind == "bias" else layer
                state[key] = torch.tensor(flat)
    model.load_state_dict(state)


def describe_model(config: ConfigDict, arrays: Mapping[str, np.ndarray] | None) -> dict[str, float]:
    """Parameters and FLOPs of a pair, with nothing computed; with the JAX model's `arrays`, loss and gradients' norm.

    Args:
      config: of the model.
      arrays: parameters by path, and the uint8 "frames" `[B, 2, H, W, 3]`.
    """
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):
        model = Como(config)
        size, pairs = config.data.image_size, 2
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros((pairs, 2, size, size, 3), dtype=torch.uint8)).backward()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = {"parameters": parameters, "flops": counter.get_total_flops() / pairs}
    if arrays is None:
        return found
    model, arrays = Como(config), dict(arrays)
    frames = torch.from_numpy(arrays.pop("frames"))
    load_arrays(model, arrays)
    loss = model(frames)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]))
    return found | {"loss": loss.item(), "gradient_norm": norm.item()}


def make_step(config: ConfigDict, device: torch.device, compiled: bool) -> Callable[[Tensor], Tensor]:
    """A function that does one update, on frames of the device, and returns the loss."""
    torch.manual_seed(config.seed)
    half = config.train.dtype == "bfloat16"
    model = Como(config).to(device)
    if half:
        model.encoder.to(torch.bfloat16)
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        weight_decay=optim.weight_decay,
        fused=True,
    )
    loss_of = torch.compile(model) if compiled else model

    def step(frames: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext():
            loss = loss_of(frames)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(
    config: ConfigDict, device: torch.device, compiled: bool, windows: int, steps: int, warm_up: int
) -> dict[str, Any]:
    """Times steps as `tools.benchmarks.train_step.measure` does, and returns the same figures."""
    size, count = config.data.image_size, config.data.batch_size
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(rng.integers(0, 256, (count, 2, size, size, 3), dtype=np.uint8)).to(device)
    step = make_step(config, device, compiled)
    begin = time.perf_counter()
    step(frames).item()
    first = time.perf_counter() - begin

    def run(number: int) -> None:
        for _ in range(number):
            loss = step(frames)
        # Waits for the device.
        loss.item()

    run(max(1, warm_up - 1))
    seconds = []
    for _ in range(windows):
        begin = time.perf_counter()
        run(steps)
        seconds.append((time.perf_counter() - begin) / steps)
    on_device = device.type == "cuda"
    return {
        "version": f"torch {torch.__version__}",
        "batch_size": count,
        "rates": [count / each for each in seconds],
        "compile_seconds": first,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_device else peak_resident_bytes(),
        "peak_of": "device" if on_device else "process",
    }


def define_flags() -> None:
    """Defines the flags of the command."""
    config_flags.DEFINE_config_file("config", None, "Recipe of CoMo.")
    flags.DEFINE_string("json", None, "File that gets the figures.")
    flags.DEFINE_bool("describe", False, "Count and check instead of timing; see --arrays.")
    flags.DEFINE_string("arrays", None, "Parameters and frames, .npz, whose loss to compute.")
    flags.DEFINE_string("device", "cpu", "cpu or cuda.")
    flags.DEFINE_bool("compile", False, "Whether by torch.compile.")
    flags.DEFINE_integer("windows", 3, "Windows to time.", lower_bound=1)
    flags.DEFINE_integer("steps", 1, "Steps of a window.", lower_bound=1)
    flags.DEFINE_integer("warm_up", 2, "Steps before, the first of which compiles.", lower_bound=1)
    flags.mark_flags_as_required(["config", "json"])


def main(arguments: Sequence[str]) -> None:
    """Writes the figures."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    if given.describe:
        with np.load(given.arrays) if given.arrays else contextlib.nullcontext() as arrays:
            write_figures(given.json, describe_model(given.config, arrays))
        return
    device = torch.device(given.device)
    if device.type == "cuda":
        # TF32, as JAX takes it there.
        torch.set_float32_matmul_precision("high")
    write_figures(given.json, measure(given.config, device, given.compile, given.windows, given.steps, given.warm_up))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
