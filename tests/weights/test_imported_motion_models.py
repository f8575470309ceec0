"""Imported LAQ, Moto and CoMo against plain PyTorch that computes as their released code does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from flax import traverse_util

from como_jax.errors import ConfigError, RunError
from como_jax.motion.models import build_model
from como_jax.nn.layers import normalize_frames
from como_jax.training.imported import check_parameters, make_config
from como_jax.weights.importing import Flat, Foreign, Format, Options, import_parameters
from como_jax.weights.laq_openx import laq_openx
from como_jax.weights.moto import como, moto
from como_jax.weights.tensors import Weights
from tools.import_weights import load_recipe

torch = pytest.importorskip("torch")
models = pytest.importorskip("tests.weights.torch_models")

TOLERANCE = 1e-5
WIDTH, HEADS, HEAD, LATENT, CODES, SIDE = 12, 3, 8, 6, 5, 3


def convert(make: Format, tensors: dict[str, Any], **options: Any) -> tuple[Flat, Foreign]:
    weights = Weights(epath.Path("weights.bin"), {name: np.asarray(tensor) for name, tensor in tensors.items()})
    foreign = make(weights, Options(**options))
    return import_parameters(weights, foreign)[0], foreign


def run(params: Flat, foreign: Foreign, compute: Callable[[Any, jax.Array], Any], frames: np.ndarray) -> Any:
    """What a model of the imported config computes, in float32."""
    config = make_config(foreign, load_recipe)
    check_parameters(config, params)
    config.train.dtype = "float32"
    model = build_model(config)
    nested = traverse_util.unflatten_dict(params, sep="/")
    return jax.tree.map(np.asarray, jax.jit(lambda params, frames: compute(model.bind(params), frames))(nested, frames))


def random_frames(size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 2, size, size, 3), np.uint8)


def laq_shapes() -> dict[str, tuple[int, ...]]:
    hidden, inner, pixels = int(4 * (2 / 3) * WIDTH), HEADS * HEAD, SIDE**2 * 3
    shapes: dict[str, tuple[int, ...]] = {
        "to_patch_emb_first_frame.1.weight": (pixels,),
        "to_patch_emb_first_frame.1.bias": (pixels,),
        "to_patch_emb_first_frame.2.weight": (WIDTH, pixels),
        "to_patch_emb_first_frame.2.bias": (WIDTH,),
        "to_patch_emb_first_frame.3.weight": (WIDTH,),
        "to_patch_emb_first_frame.3.bias": (WIDTH,),
        "spatial_rel_pos_bias.net.0.0.weight": (WIDTH, 2),
        "spatial_rel_pos_bias.net.0.0.bias": (WIDTH,),
        "spatial_rel_pos_bias.net.1.0.weight": (WIDTH, WIDTH),
        "spatial_rel_pos_bias.net.1.0.bias": (WIDTH,),
        "spatial_rel_pos_bias.net.2.weight": (HEADS, WIDTH),
        "spatial_rel_pos_bias.net.2.bias": (HEADS,),
        "vq.codebooks": (CODES, LATENT),
        "vq.project_in.weight": (LATENT, WIDTH),
        "vq.project_in.bias": (LATENT,),
        "vq.project_out.weight": (WIDTH, LATENT),
        "vq.project_out.bias": (WIDTH,),
        "to_pixels_first_frame.0.weight": (pixels, WIDTH),
        "to_pixels_first_frame.0.bias": (pixels,),
    }
    for number in (0, 2):
        shapes |= {
            f"vq.cnn_encoder.{number}.weight": (LATENT, LATENT, 3, 3),
            f"vq.cnn_encoder.{number}.bias": (LATENT,),
        }
    for name in ("enc_spatial_transformer", "enc_temporal_transformer", "dec_spatial_transformer"):
        shapes |= {f"{name}.norm_out.{end}": (WIDTH,) for end in ("gamma", "beta")}
        layer = f"{name}.layers.0."
        shapes |= {f"{layer}0.dsconv.weight": (WIDTH, 1, 3, 3, 3), f"{layer}0.dsconv.bias": (WIDTH,)}
        shapes |= {f"{layer}3.0.weight": (WIDTH,), f"{layer}3.0.bias": (WIDTH,)}
        shapes |= {f"{layer}3.1.weight": (2 * hidden, WIDTH), f"{layer}3.4.weight": (WIDTH, hidden)}
        for number, null in ((1, 0), (2, 4))[: 1 + name.startswith("dec")]:
            part = f"{layer}{number}."
            shapes |= {
                f"{part}{norm}.{end}": (WIDTH,) for norm in ("norm", "context_norm") for end in ("gamma", "beta")
            }
            shapes |= {f"{part}null_kv": (HEADS, null, HEAD), f"{part}q_scale": (HEAD,), f"{part}k_scale": (HEAD,)}
            shapes |= {f"{part}to_q.weight": (inner, WIDTH), f"{part}to_kv.weight": (2 * inner, WIDTH)}
            shapes |= {f"{part}to_out.weight": (WIDTH, inner)}
    return shapes


class TorchLaq:
    """LAPA's forward pass, with the order of axes that its code has."""

    def __init__(self, tensors: dict[str, Any]):
        self.tensors = tensors
        place = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1).reshape(-1, 2)
        offset = (place[:, None] - place[None]).float()
        x = torch.sign(offset) * torch.log(offset.abs() + 1)
        for number in (0, 1):
            x = torch.nn.functional.leaky_relu(models.linear(x, tensors, f"spatial_rel_pos_bias.net.{number}.0"), 0.1)
        self.bias = models.linear(x, tensors, "spatial_rel_pos_bias.net.2").permute(2, 0, 1)

    def embed(self, frames: Any) -> Any:
        """`[B, T, 8, 8, D]` of frames `[B, T, H, W, 3]` in [0, 1]; a patch is read channel by channel."""
        patches = frames.unflatten(2, (8, SIDE)).unflatten(4, (8, SIDE)).permute(0, 1, 2, 4, 6, 3, 5).flatten(4)
        name = "to_patch_emb_first_frame"
        x = models.linear(models.norm(patches, self.tensors, f"{name}.1", 1e-5), self.tensors, f"{name}.2")
        return models.norm(x, self.tensors, f"{name}.3", 1e-5)

    def norm(self, x: Any, name: str) -> Any:
        gamma, beta = self.tensors[f"{name}.gamma"], self.tensors[f"{name}.beta"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], gamma, beta)

    def attend(self, x: Any, context: Any, part: str, bias: Any) -> Any:
        """Keys and values are made of a normalised context, but of tokens as they are."""
        read = x if context is None else self.norm(context, f"{part}.context_norm")
        query = models.linear(self.norm(x, f"{part}.norm"), self.tensors, f"{part}.to_q")
        key, value = models.linear(read, self.tensors, f"{part}.to_kv").chunk(2, -1)
        query, key, value = (y.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for y in (query, key, value))
        null = self.tensors[f"{part}.null_kv"].expand(len(x), -1, -1, -1)
        key, value = torch.cat([null[:, :, 0::2], key], 2), torch.cat([null[:, :, 1::2], value], 2)
        query, key = (torch.nn.functional.normalize(y, dim=-1) for y in (query, key))
        query, key = query * self.tensors[f"{part}.q_scale"], key * self.tensors[f"{part}.k_scale"]
        logits = 8 * query @ key.transpose(-1, -2) + bias
        mixed = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return models.linear(mixed, self.tensors, f"{part}.to_out")

    def transform(self, x: Any, shape: tuple[int, ...], name: str, bias: Any, context: Any = None) -> Any:
        """One layer on `[N, M, D]`, which the convolution over positions reads as `shape`, whatever the order."""
        layer, functional = f"{name}.layers.0.", torch.nn.functional
        video = functional.pad(x.reshape(shape).permute(0, 4, 1, 2, 3), (1, 1, 1, 1, 2, 0))
        kernel, offset = self.tensors[f"{layer}0.dsconv.weight"], self.tensors[f"{layer}0.dsconv.bias"]
        x = x + functional.conv3d(video, kernel, offset, groups=WIDTH).permute(0, 2, 3, 4, 1).reshape(x.shape)
        x = x + self.attend(x, None, f"{layer}1", bias)
        if context is not None:
            x = x + self.attend(x, context, f"{layer}2", 0.0)
        hidden, gate = models.linear(
            models.norm(x, self.tensors, f"{layer}3.0", 1e-5), self.tensors, f"{layer}3.1"
        ).chunk(2, -1)
        x = x + models.linear(hidden * functional.gelu(gate), self.tensors, f"{layer}3.4")
        return self.norm(x, f"{name}.norm_out")

    def infer(self, tokens: Any) -> Any:
        """What is quantised, `[B, 4, L]`."""
        batch, functional = len(tokens), torch.nn.functional
        x = self.transform(tokens.flatten(0, 1).flatten(1, 2), tokens.shape, "enc_spatial_transformer", self.bias)
        x = x.reshape(batch, 2, 64, WIDTH).transpose(1, 2).flatten(0, 1)
        x = self.transform(x, tokens.shape, "enc_temporal_transformer", 0.0)
        x = models.linear(x.reshape(batch, 64, 2, WIDTH).transpose(1, 2), self.tensors, "vq.project_in")
        first, second = (f"vq.cnn_encoder.{number}" for number in (0, 2))
        x = x.flatten(0, 1).transpose(1, 2).reshape(batch * 2, LATENT, 8, 8)
        x = functional.conv2d(x, self.tensors[f"{first}.weight"], self.tensors[f"{first}.bias"], stride=2, padding=1)
        x = functional.conv2d(functional.relu(x), self.tensors[f"{second}.weight"], self.tensors[f"{second}.bias"])
        pooled = x.reshape(batch, 2, LATENT, 4).transpose(2, 3)
        return pooled[:, 1] - pooled[:, 0]

    def draw(self, tokens: Any, latent: Any) -> Any:
        """`[B, H, W, 3]` of tokens `[B, 1, 8, 8, D]` and `latent` `[B, 4, L]`, read in another shape."""
        actions = models.linear(latent.reshape(-1, LATENT, 4).transpose(1, 2), self.tensors, "vq.project_out")
        x = self.transform(tokens.flatten(1, 3), tokens.shape, "dec_spatial_transformer", self.bias, actions)
        pixels = models.linear(x, self.tensors, "to_pixels_first_frame.0").reshape(-1, 8, 8, 3, SIDE, SIDE)
        return pixels.permute(0, 1, 4, 2, 5, 3).reshape(len(x), 8 * SIDE, 8 * SIDE, 3)


def test_laq_computes_as_lapa_s_code_does() -> None:
    tensors = models.random_tensors(laq_shapes())
    params, foreign = convert(laq_openx, tensors)
    frames = random_frames(8 * SIDE)

    def compute(laq: Any, frames: jax.Array) -> Any:
        inferred = laq._infer(frames)[:, 0]
        label = laq.bottleneck.latent_motion(inferred)
        return inferred, label.codes, laq._draw(frames[:, 0] / 255.0, label.latent)

    inferred, codes, drawn = run(params, foreign, compute, frames)
    reference, pixels = TorchLaq(tensors), torch.tensor(frames).float() / 255
    expected = reference.infer(reference.embed(pixels))
    expected_codes = torch.cdist(expected, tensors["vq.codebooks"][None]).argmin(-1)
    assert models.relative_error(inferred, expected) < TOLERANCE
    np.testing.assert_array_equal(codes, expected_codes)
    image = reference.draw(reference.embed(pixels[:, :1]), tensors["vq.codebooks"][expected_codes])
    assert models.relative_error(drawn, image) < TOLERANCE


def test_laq_of_another_image_size_or_length_is_refused() -> None:
    tensors = models.random_tensors(laq_shapes())
    with pytest.raises(ConfigError, match="`image_size` must be 24: LAQ pools 8 x 8 patches"):
        convert(laq_openx, tensors, image_size=48)
    # One latent action a pair.
    tensors["vq.cnn_encoder.2.weight"] = torch.zeros(LATENT, LATENT, 4, 4)
    with pytest.raises(RunError, match=r"cnn_encoder\.2\.weight is \(6, 6, 4, 4\) and must be \(6, 6, 3, 3\)"):
        convert(laq_openx, tensors)


QUERIES, DRAWER = 2, 16
HEADS_OF = {"num_heads": 3, "decoder_heads": 2}


def moto_tensors() -> dict[str, Any]:
    """Moto's latent motion tokenizer around the encoder of `torch_models.mae`, with the blocks under timm's names."""
    tokens, width = models.GRID**2, DRAWER
    pixels = models.PATCH**2 * 3
    shapes: dict[str, tuple[int, ...]] = {
        "m_former.embeddings.latent_motion_token": (1, QUERIES, width),
        "m_former.embeddings.sep_token": (1, 1, width),
        "m_former.embeddings.projection.weight": (width, models.WIDTH),
        "m_former.embeddings.projection.bias": (width,),
        "m_former.embeddings.position_embeddings": (1, 2 * (tokens + 1) + 1 + QUERIES, width),
        "m_former.embeddings.token_type_embeddings": (2, width),
        "m_former.layernorm.weight": (width,),
        "m_former.layernorm.bias": (width,),
        "vector_quantizer.embedding.weight": (CODES, LATENT),
        "decoder.transformer.embeddings.patch_embeddings.projection.weight": (width, 3, models.PATCH, models.PATCH),
        "decoder.transformer.embeddings.patch_embeddings.projection.bias": (width,),
        "decoder.transformer.embeddings.query_pooling_layer.weight": (width, QUERIES * width),
        "decoder.transformer.embeddings.query_pooling_layer.bias": (width,),
        "decoder.transformer.embeddings.position_embeddings": (1, tokens, width),
        "decoder.transformer.layernorm.weight": (width,),
        "decoder.transformer.layernorm.bias": (width,),
        "decoder.decoder.0.weight": (pixels, width, 1, 1),
        "decoder.decoder.0.bias": (pixels,),
        **models.vit_shapes("m_former.encoder.layer", width, 1),
        **models.vit_shapes("decoder.transformer.encoder.layer", width, 1),
    }
    for name, sizes in (("down", (width, width, LATENT)), ("up", (LATENT, LATENT, width))):
        for number, (inputs, outputs) in ((0, sizes[:2]), (2, sizes[1:])):
            shapes |= {f"vq_{name}_resampler.{number}.weight": (outputs, inputs)}
            shapes |= {f"vq_{name}_resampler.{number}.bias": (outputs,)}
    tensors = models.random_tensors(shapes)
    # Small, as they are before training; the epsilon of the norms matters here.
    tensors["m_former.embeddings.latent_motion_token"] *= 1e-3
    tensors["m_former.embeddings.position_embeddings"][:, :QUERIES] *= 1e-3
    tensors["m_former.embeddings.token_type_embeddings"][0] *= 1e-3
    return tensors


def encoder_tensors() -> dict[str, Any]:
    names = models.as_huggingface(models.mae(decoder=False))
    return {name.replace("vit.", "image_encoder.", 1): tensor for name, tensor in names.items()}


class TorchMoto:
    """Moto's forward pass, of images that are normalised."""

    def __init__(self, tensors: dict[str, Any], *, separate_types: bool):
        self.tensors, self.separate_types = tensors, separate_types

    def infer(self, condition: Any, motion: Any) -> Any:
        """The latent `[B, Q, L]` before anything quantises it."""
        name, tensors = "m_former.embeddings.", self.tensors
        learned = [
            tensors[f"{name}{part}"].expand(len(condition), -1, -1) for part in ("latent_motion_token", "sep_token")
        ]
        condition, motion = (models.linear(x, tensors, f"{name}projection") for x in (condition, motion))
        types = tensors[f"{name}token_type_embeddings"]
        first = torch.cat([learned[0], condition, learned[1]], 1) + types[0]
        x = torch.cat([first, motion + types[int(self.separate_types)]], 1) + tensors[f"{name}position_embeddings"]
        x = models.blocks(x, tensors, "m_former.encoder.layer", 1, 2, 1e-12)
        x = models.norm(x, tensors, "m_former.layernorm", 1e-12)[:, :QUERIES]
        return self.resample(x, "vq_down_resampler")

    def resample(self, x: Any, name: str) -> Any:
        return models.linear(torch.tanh(models.linear(x, self.tensors, f"{name}.0")), self.tensors, f"{name}.2")

    def draw(self, images: Any, latent: Any) -> Any:
        """Normalised `[B, H, W, 3]`."""
        name, tensors = "decoder.transformer.embeddings.", self.tensors
        motion = models.linear(
            self.resample(latent, "vq_up_resampler").flatten(1), tensors, f"{name}query_pooling_layer"
        )
        x = models.patches(images, tensors, f"{name}patch_embeddings.projection") + motion[:, None]
        x = x + tensors[f"{name}position_embeddings"]
        x = models.blocks(x, tensors, "decoder.transformer.encoder.layer", 1, 2, 1e-12)
        x = models.norm(x, tensors, "decoder.transformer.layernorm", 1e-12).transpose(1, 2)
        x = x.unflatten(2, (models.GRID, models.GRID))
        x = torch.nn.functional.conv2d(x, tensors["decoder.decoder.0.weight"], tensors["decoder.decoder.0.bias"])
        return torch.nn.functional.pixel_shuffle(x, models.PATCH).permute(0, 2, 3, 1)


@pytest.mark.parametrize("kind", ["moto", "como"])
def test_latent_motion_models_compute_as_moto_s_code_does(kind: str) -> None:
    tensors = moto_tensors()
    if kind == "como":
        del tensors["vector_quantizer.embedding.weight"]
    separate = kind == "como"
    make = moto if kind == "moto" else como
    named = {**models.as_huggingface(tensors), **encoder_tensors()}
    params, foreign = convert(make, named, separate_types=separate, **HEADS_OF)
    frames = random_frames(models.IMAGE)

    def compute(model: Any, frames: jax.Array) -> Any:
        inferred = model._infer_consecutive(frames)[:, 0]
        latent = model.bottleneck(inferred).latent
        return inferred, latent, model.fdm(normalize_frames(frames[:, 0]), model._hidden(latent))

    inferred, latent, drawn = run(params, foreign, compute, frames)
    images = torch.tensor(np.asarray(normalize_frames(frames)))
    first, second = (models.encode(images[:, number], models.mae(decoder=False), 1e-12) for number in (0, 1))
    reference = TorchMoto(tensors, separate_types=separate)
    expected = reference.infer(first, second if kind == "moto" else second - first)
    assert models.relative_error(inferred, expected) < TOLERANCE
    if kind == "moto":
        codebook = tensors["vector_quantizer.embedding.weight"]
        expected = codebook[torch.cdist(expected, codebook[None]).argmin(-1)]
    assert models.relative_error(latent, expected) < TOLERANCE
    assert models.relative_error(drawn, reference.draw(images[:, 0], expected)) < TOLERANCE


def test_the_encoder_that_a_file_leaves_out_comes_from_another_run() -> None:
    tensors = models.as_huggingface(moto_tensors())
    whole, foreign = convert(moto, {**tensors, **encoder_tensors()}, **HEADS_OF)
    encoder = {path: value for path, value in whole.items() if path.startswith("encoder/")}
    fields = {name: value for name, value in foreign.config.items() if name.startswith(("encoder.", "data.image"))}
    params, other = convert(moto, tensors, encoder=encoder, encoder_config=fields, **HEADS_OF)
    assert other.config == foreign.config
    assert params.keys() == whole.keys()
    for path, value in whole.items():
        np.testing.assert_array_equal(params[path], value)
    with pytest.raises(RunError, match="holds no image_encoder; set `encoder` to a run of MAE ViT-L"):
        convert(moto, tensors, **HEADS_OF)
    with pytest.raises(RunError, match=r"reads features of width 24, but the encoder has width 32"):
        convert(moto, tensors, encoder=encoder, encoder_config=fields | {"encoder.width": 32}, **HEADS_OF)
    with pytest.raises(RunError, match=r"has a codebook.*is it of the format moto"):
        convert(como, tensors, **HEADS_OF)
