"""FLOPs of one training sample by formula: the matrix products that the model asks for, whatever the machine does.

A product of `[m, k]` and `[k, n]` is 2 m n k. Behind it, a trained layer costs as much again for the gradient of its
parameters and once more for that of its input; a frozen layer that a gradient passes costs the latter alone.
Rematerialisation, element-wise work and the optimiser do not count, so that FLOPs over time and peak are the share of
the peak that goes into the model (MFU; PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

from ml_collections import ConfigDict

from como_jax.errors import ConfigError
from como_jax.motion.build import pairs_of_clip
from como_jax.motion.perceptual import LAYOUTS
from como_jax.nn.vit import vit_config
from como_jax.policies.heads import DRAWS
from como_jax.policies.observation import ConvTower
from como_jax.spec.policies import CONV_STRIDE
from como_jax.spec.towers import BYTE_VOCABULARY, GATED, PUBLIC_TOWERS, VitConfig
from como_jax.types import FLOW_STRIDE


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one forward pass.

    Attributes:
      linear: products of parameters with activations.
      mixing: products of activations with each other.
      entry: like `linear`, of layers that read data, whose input takes no gradient.
    """

    linear: float = 0.0
    mixing: float = 0.0
    entry: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.linear + other.linear, self.mixing + other.mixing, self.entry + other.entry)

    def __mul__(self, times: float) -> Work:
        return Work(times * self.linear, times * self.mixing, times * self.entry)

    __rmul__ = __mul__

    @property
    def forward(self) -> float:
        """Without any gradient."""
        return self.linear + self.mixing + self.entry

    @property
    def trained(self) -> float:
        """Forward and backward."""
        return 3 * self.linear + 3 * self.mixing + 2 * self.entry

    @property
    def passed(self) -> float:
        """Forward and backward through frozen parameters, to what was put in."""
        return 2 * self.linear + 3 * self.mixing + 2 * self.entry


def train_flops(config: ConfigDict) -> dict[str, float]:
    """FLOPs of one sample (a clip, or an observation with what follows) in one step, by part of the model.

    Args:
      config: of a recipe; of a policy with its sizes filled in.

    Raises:
      ConfigError: there is no formula for the family.
    """
    if config.family not in _FORMULAS:
        raise ConfigError(f"config.family {config.family!r} has no FLOP formula; known are {', '.join(_FORMULAS)}.")
    return _FORMULAS[config.family](config)


def linear(tokens: float, *sizes: int) -> Work:
    """Layers of these sizes, one after the other, on every token."""
    return Work(linear=sum(2.0 * tokens * inputs * outputs for inputs, outputs in itertools.pairwise(sizes)))


def entry(tokens: float, inputs: int, outputs: int) -> Work:
    """A first layer."""
    return Work(entry=2.0 * tokens * inputs * outputs)


def attention(queries: float, keys: float, width: int) -> Work:
    """Logits and weighted means."""
    return Work(mixing=4.0 * queries * keys * width)


def block(tokens: int, width: int, mlp_width: int = 0, outputs: int = 0) -> Work:
    """A transformer block; with `outputs`, one that computes only its first so many tokens."""
    outputs, mlp_width = outputs or tokens, mlp_width or 4 * width
    keys_and_values = 2 * linear(tokens, width, width)
    query_and_projection = linear(outputs, width, width, width)
    mixing, mlp = attention(outputs, tokens, width), linear(outputs, width, mlp_width, width)
    return keys_and_values + query_and_projection + mixing + mlp


def vit(config: VitConfig, tokens: int | None = None) -> Work:
    """A ViT on one image, whose blocks see a class token and all patches, or so many tokens in all."""
    patches = config.grid**2
    embed = entry(patches, config.patch_size**2 * 3, config.width)
    blocks = block(patches + 1 if tokens is None else tokens, config.width, getattr(config, "mlp_width", 0))
    return embed + config.depth * blocks


def _como(config: ConfigDict) -> dict[str, float]:
    """CoMo and its variants, of a clip."""
    encoder, model = vit_config(config), config.model
    instants, pairs = config.data.instants, pairs_of_clip(config)
    frames = instants + (instants - 1 if model.tcl_weight else 0)
    extra = 2 * pairs if model.tcl_weight else 0
    if model.motion_input == "rgb_difference":
        frames += pairs + extra
    of_image = vit(encoder)
    idm = _inverse_dynamics(config, encoder)
    parts = {
        "encoder": frames * (of_image.forward if config.encoder.frozen else of_image.trained),
        "idm": pairs * idm.trained + extra * (idm.trained if model.tcl_gradient_everywhere else idm.forward),
        "fdm": pairs * _forward_dynamics(config, encoder).trained,
    }
    if model.perceptual_weight:
        parts["perceptual"] = pairs * _perceptual(config, of_image)
    return parts


def _inverse_dynamics(config: ConfigDict, encoder: VitConfig) -> Work:
    """The motion Q-former, whose last layer computes the queries alone, of a pair."""
    model, features = config.model, encoder.grid**2 + 1
    images = 1 if model.motion_input == "future_only" else 2
    tokens = model.num_queries + images * features + images - 1
    project = (entry if config.encoder.frozen else linear)(images * features, encoder.width, model.idm_width)
    layers = (model.idm_depth - 1) * block(tokens, model.idm_width)
    last = block(tokens, model.idm_width, outputs=model.num_queries)
    return project + layers + last + linear(model.num_queries, model.idm_width, model.idm_width, model.latent_dim)


def _forward_dynamics(config: ConfigDict, encoder: VitConfig) -> Work:
    """The FDM with its heads, of a pair."""
    model, width = config.model, config.model.fdm_width
    patches, pixels = (config.data.image_size // model.fdm_patch_size) ** 2, model.fdm_patch_size**2 * 3
    latent = linear(model.num_queries, model.latent_dim, width) + linear(1, model.num_queries * width, width)
    work = entry(patches, pixels, width) + latent + model.fdm_depth * block(patches, width)
    work += linear(patches, width, pixels)
    if model.feature_weight:
        work += linear(patches, width, encoder.width)
    if model.flow_weight:
        work += linear(patches, width, (model.fdm_patch_size // FLOW_STRIDE) ** 2 * 2)
    return work


def _perceptual(config: ConfigDict, of_image: Work) -> float:
    """Drawn and true picture through a frozen network, with the gradient to the drawn one."""
    if config.model.perceptual_space == "encoder":
        # The true picture's features are there already.
        return of_image.passed
    size, channels, work = config.data.image_size, 3, Work()
    for spec in LAYOUTS[config.model.perceptual_space]:
        size = (size - spec.pool) // 2 + 1 if spec.pool else size
        size = (size + 2 * spec.padding - spec.kernel) // spec.stride + 1
        work += linear(size**2, spec.kernel**2 * channels, spec.channels)
        channels = spec.channels
    return work.passed + work.forward


def _laq(config: ConfigDict) -> dict[str, float]:
    """LAQ, of a clip, both frames of each of whose pairs are encoded."""
    model, pairs = config.model, config.data.instants - 1
    width, inner, grid = model.width, model.num_heads * model.head_size, config.data.image_size // model.patch_size
    places, pixels, pooled = grid**2, model.patch_size**2 * 3, (grid // 4) ** 2
    hidden = int(width * 4 * 2 / 3)

    def layer(tokens: int, seen: int, clip: int) -> Work:
        attend = linear(tokens, width, 3 * inner) + linear(tokens, inner, width) + attention(tokens, seen, inner)
        # Positions are generated by one matrix over the clip for every channel.
        return attend + linear(tokens, width, 2 * hidden) + linear(tokens, hidden, width) + linear(clip, clip, width)

    cross = (
        linear(places, width, inner, width) + linear(pooled, width, 2 * inner) + attention(places, pooled + 2, inner)
    )
    convolutions = linear(2 * (places / 4 + pooled), 9 * model.latent_dim, model.latent_dim)
    encoder = model.spatial_depth * layer(2 * places, places, 2 * places)
    encoder += model.temporal_depth * layer(2 * places, 2, 2 * places)
    # The decoder's norm of patches is trained, so that all layers behind it need the gradient of their input.
    encoder += linear(2 * places, pixels, width) + linear(2 * places, width, model.latent_dim) + convolutions
    decoder = model.decoder_depth * (layer(places, places, places) + cross) + linear(places, width, pixels)
    decoder += linear(pooled, model.latent_dim, width)
    again = linear(places, pixels, width).forward
    return {"encoder": pairs * encoder.trained, "decoder": pairs * (decoder.trained + again)}


def _mae(config: ConfigDict) -> dict[str, float]:
    """MAE, of a clip, of which every frame is an image."""
    encoder, model = vit_config(config), config.model
    patches, width = encoder.grid**2, model.decoder_width
    seen = 1 + max(1, round(patches * (1 - model.mask_ratio)))
    decoder = linear(seen, encoder.width, width) + model.decoder_depth * block(1 + patches, width)
    decoder += linear(patches, width, encoder.patch_size**2 * 3)
    frames = config.data.instants
    return {"encoder": frames * vit(encoder, seen).trained, "decoder": frames * decoder.trained}


def _observation(config: ConfigDict) -> tuple[dict[str, float], int, int]:
    """Towers of a policy, and tokens of one instant's pictures and state, and of the instruction."""
    data, encoder, width = config.data, config.encoder, config.model.width
    cameras, instants = max(1, len(data.cameras)), data.instants
    images = cameras * instants
    if encoder.tower == "conv":
        patches, of_image = (data.image_size // CONV_STRIDE) ** 2, _conv_tower(data.image_size, encoder.width)
    else:
        patches = vit_config(config).grid ** 2
        of_image = vit(vit_config(config), patches + (encoder.tower == "vit"))
    pooled = patches // encoder.pool**2
    project = (entry if encoder.frozen else linear)(pooled, encoder.width, width)
    towers = images * (of_image.forward if encoder.frozen else of_image.trained) + images * project.trained
    text, words = _text(config)
    state = entry(instants, data.state_size, width).trained if data.state_size else 0.0
    return {"images": towers, "text": text + state}, cameras * pooled + (data.state_size > 0), words


def _conv_tower(size: int, width: int) -> Work:
    """The convolutional tower, of one image; what falls on the padding, a row and a column, is no work."""
    work = Work()
    for inputs, outputs in itertools.pairwise(ConvTower.channels(width)):
        size //= 2
        work += (entry if inputs == 3 else linear)((3 * size - 1) ** 2, inputs, outputs)
    return work


def _text(config: ConfigDict) -> tuple[float, int]:
    """FLOPs of the instruction's tower with its projection, and the tokens that it gives."""
    text, width = config.text, config.model.width
    length, inner = text.max_length, text.num_heads * text.head_size or text.width
    if text.tower == "tokens":
        return 0.0, length
    if text.tower == "embedding":
        return entry(1, text.embedding_size, text.width).trained + linear(2, text.width, width).trained, 1
    if text.tower == "bytes":
        words, layer = length // text.pool, block(length, text.width)
    elif text.tower == "clip":
        words, layer = length, block(length, text.width, text.mlp_width)
    else:
        gates = 1 + text.activation.startswith(GATED)
        words, layer = length, linear(length, text.width, 3 * inner) + linear(length, inner, text.width)
        layer += attention(length, length, inner) + linear(length, text.width, gates * text.mlp_width)
        layer += linear(length, text.mlp_width, text.width)
    tower = text.depth * layer
    if text.frozen and text.tower in PUBLIC_TOWERS:
        return tower.forward + entry(words + 1, text.width, width).trained, words
    return (tower + linear(words + 1, text.width, width)).trained, words


def _diffusion_policy(config: ConfigDict) -> dict[str, float]:
    """The diffusion policy, of an observation with all noisy versions of its chunk."""
    model, chunk, width = config.model, config.data.chunk, config.model.width
    parts, seen, words = _observation(config)
    context = config.data.instants * seen + words
    steps, latent_size = model.draws * chunk, model.latent_queries * model.latent_dim
    layer = model.draws * block(chunk, width) + linear(model.draws, width, 9 * width)
    layer += linear(steps, width, width, width) + linear(context, width, 2 * width) + attention(steps, context, width)
    heads = entry(steps, model.action_size + latent_size, width) + linear(steps, width, model.action_size + latent_size)
    time = entry(model.draws, 128, width) + linear(model.draws, width, width) + linear(model.draws, width, 2 * width)
    return parts | {"trunk": (model.depth * layer + heads + time).trained}


def _autoregressive_policy(config: ConfigDict) -> dict[str, float]:
    """The autoregressive policy without its heads, which are small."""
    model, data = config.model, config.data
    parts, seen, words = _observation(config)
    latents = model.latent_queries + 1 if model.latent_dim else 0
    tokens = words + data.instants * (seen + latents + (data.chunk if model.action_size else 0))
    return parts | {"trunk": model.depth * block(tokens, model.width).trained}


def _latent_vla(config: ConfigDict) -> dict[str, float]:
    """The vision-language-action model, of an observation with what is written of it."""
    model, text = config.model, config.text
    parts, seen, words = _observation(config)
    outputs: list[tuple[int, int, str]] = []
    if model.action_size and model.action_head == "bins":
        outputs.append((config.data.chunk * model.action_size, model.num_bins, "codes"))
    elif model.action_size:
        outputs.append((config.data.chunk, model.action_size, model.action_head))
    if model.codebook_size:
        outputs.append((model.latent_queries, model.codebook_size, "codes"))
    elif model.latent_dim:
        outputs.append((model.latent_queries, model.latent_dim, model.latent_head))
    tokens = config.data.instants * seen + words + sum(length for length, _, _ in outputs)
    heads = sum((_output(model, *output) for output in outputs), Work())
    parts |= {"trunk": model.depth * _decoder_block(model, tokens), "heads": heads.trained}
    if model.text_weight:
        predict = linear(words, model.width, text.vocabulary_size or BYTE_VOCABULARY - 1)
        parts["text"] += predict.passed if text.frozen else predict.trained
    return parts


def _decoder_block(model: ConfigDict, tokens: int) -> float:
    """A block of the decoder, whose kernels are frozen beside low-rank changes of them."""
    queries, shared = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    gated = [(model.width, model.mlp_width)] * 2 + [(model.mlp_width, model.width)]
    kernels = [(model.width, queries), (model.width, shared), (model.width, shared), (queries, model.width), *gated]
    work, mixing = sum((linear(tokens, *sizes) for sizes in kernels), Work()), attention(tokens, tokens, queries)
    if not model.lora_rank:
        return (work + mixing).trained
    changes = sum((linear(tokens, inputs, model.lora_rank, outputs) for inputs, outputs in kernels), Work())
    return work.passed + (changes + mixing).trained


def _output(model: ConfigDict, length: int, size: int, head: str) -> Work:
    """Both ends of so many tokens that are written: codes of so many, or vectors of that size."""
    width, hidden, draws = model.width, model.head_width, length * DRAWS
    if head == "codes":
        return linear(length, width, size)
    embed = entry(length - 1, size, width)
    if head == "regression":
        return embed + linear(length, width, size)
    network = entry(draws, size, hidden) + entry(draws, hidden, hidden) + linear(draws, hidden, size)
    layer = linear(draws, hidden, 2 * hidden) + linear(draws, hidden, hidden, hidden)
    network += model.head_depth * layer
    return embed + linear(length, width, hidden) + network


# A new family gets its function here.
_FORMULAS: dict[str, Callable[[ConfigDict], dict[str, float]]] = {
    "como": _como,
    "laq": _laq,
    "mae": _mae,
    "diffusion_policy": _diffusion_policy,
    "autoregressive_policy": _autoregressive_policy,
    "latent_vla": _latent_vla,
}
