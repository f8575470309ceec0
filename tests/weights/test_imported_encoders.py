"""Imported encoders against plain PyTorch and, where they are installed, transformers and timm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import traverse_util

from como_jax.errors import ConfigError, RunError
from como_jax.motion.mae import Mae
from como_jax.nn.layers import sincos_position_embedding
from como_jax.nn.model_def import ModelDef
from como_jax.nn.vit import Siglip
from como_jax.spec.images import IMAGENET_MEAN, IMAGENET_STD
from como_jax.spec.motion import MaeConfig
from como_jax.spec.towers import VitConfig
from como_jax.weights.importing import Accounts, Flat, Format, Options, import_parameters
from como_jax.weights.tensors import Weights, read_weights
from como_jax.weights.vit_encoders import mae_facebook, mae_huggingface, siglip, timm_vit

torch = pytest.importorskip("torch")
models = pytest.importorskip("tests.weights.torch_models")

OPTIONS = {"num_heads": 3, "decoder_heads": 2}
DECODER = MaeConfig(decoder_width=16, decoder_depth=1, decoder_heads=2, mask_ratio=0.75)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 20, 20, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def run() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Features and drawn patches of `Mae` where nothing is masked; a decoder that is missing is one of zeros."""
    vit = VitConfig(image_size=20, patch_size=5, width=24, depth=2, num_heads=3)
    model = ModelDef.create(lambda rngs: Mae(vit, DECODER, rngs=rngs))
    shapes = traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0)), sep="/")

    @jax.jit
    def compute(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        mae = model.bind(params)
        features = mae.encoder(images)
        x = mae.decoder_embed(features).at[:, 1:].add(sincos_position_embedding(4, 4, 16))
        return features, mae.decoder_pred(mae.decoder_norm(mae.decoder_blocks(x))[:, 1:])

    def run(params: Flat, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert {path: value.shape for path, value in params.items()}.items() <= {
            path: leaf.shape for path, leaf in shapes.items()
        }.items()
        whole = {path: params.get(path, np.zeros(leaf.shape, np.float32)) for path, leaf in shapes.items()}
        return jax.tree.map(np.asarray, compute(traverse_util.unflatten_dict(whole, sep="/"), jnp.asarray(images)))

    return run


def convert(make: Format, tensors: dict[str, Any], **options: Any) -> tuple[Flat, Accounts, dict[str, Any]]:
    weights = Weights(epath.Path("weights.pth"), {name: np.asarray(tensor) for name, tensor in tensors.items()})
    foreign = make(weights, Options(**{**OPTIONS, **options}))
    params, accounts = import_parameters(weights, foreign)
    return params, accounts, {"family": foreign.family, **foreign.config}


def convert_file(make: Format, folder: Path) -> tuple[Flat, Accounts, dict[str, Any]]:
    weights, settings = read_weights(folder), json.loads((folder / "config.json").read_text())
    foreign = make(weights, Options(settings=settings))
    params, accounts = import_parameters(weights, foreign)
    return params, accounts, {"family": foreign.family, **foreign.config}


def randomize(model: Any, fixed: dict[str, Any]) -> None:
    random = models.random_tensors({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    model.load_state_dict(random | fixed)


@pytest.mark.parametrize("layout", ["facebook", "huggingface"])
def test_an_mae_gives_the_same_features_and_images(layout: str, images: np.ndarray, run: Callable[..., Any]) -> None:
    tensors = models.mae()
    make, named = (mae_facebook, tensors) if layout == "facebook" else (mae_huggingface, models.as_huggingface(tensors))
    params, accounts, config = convert(make, named)
    features, drawn = run(params, images)
    expected = models.encode(images, tensors)
    assert models.relative_error(features, expected) < TOLERANCE
    assert models.relative_error(drawn, models.decode(expected, tensors)) < TOLERANCE
    assert list(accounts.skipped) == [name for name in named if name.endswith("decoder_pos_embed")]
    assert len(accounts.loaded) == len(named) - 1 and not accounts.resized and not accounts.filled
    assert config == {
        "family": "mae",
        "data.image_size": 20,
        **{"encoder.patch_size": 5, "encoder.width": 24, "encoder.depth": 2, "encoder.num_heads": 3},
        **{"model.decoder_width": 16, "model.decoder_depth": 1, "model.decoder_heads": 2},
    }


def test_an_encoder_alone_is_no_mae_and_needs_no_prefix(images: np.ndarray, run: Callable[..., Any]) -> None:
    tensors = models.mae(decoder=False)
    bare = {name.removeprefix("vit."): tensor for name, tensor in models.as_huggingface(tensors).items()}
    params, _, config = convert(mae_huggingface, bare)
    assert models.relative_error(run(params, images)[0], models.encode(images, tensors)) < TOLERANCE
    assert config["family"] == "encoder" and all(path.startswith("encoder/") for path in params)


def test_an_mae_gives_the_features_of_transformers(tmp_path: Path, images: np.ndarray, run: Callable[..., Any]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    # The epsilon of the authors; what transformers has as default differs where the class token is small.
    sizes |= {"decoder_intermediate_size": 64, "image_size": 20, "patch_size": 5, "layer_norm_eps": 1e-6}
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes, **decoder, mask_ratio=0.0)).eval()
    positions = {"vit.embeddings.position_embeddings": 24, "decoder.decoder_pos_embed": 16}
    randomize(model, {name: models.sincos(4, width) for name, width in positions.items()})
    model.save_pretrained(tmp_path)
    params, _, _ = convert_file(mae_huggingface, tmp_path)
    with torch.no_grad():
        pixels = torch.tensor(images).permute(0, 3, 1, 2)
        # In the order of the places: transformers shuffles patches even where none is masked.
        expected = model(pixels, noise=torch.arange(16.0).expand(2, -1))
        features = model.vit(pixels, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
    found = run(params, images)
    assert models.relative_error(found[0], features) < TOLERANCE
    assert models.relative_error(found[1], expected.logits) < TOLERANCE


def test_timm_s_pixels_are_folded_into_the_patches(images: np.ndarray, run: Callable[..., Any]) -> None:
    tensors = models.mae(decoder=False) | {"head.weight": torch.zeros(7, 24), "head.bias": torch.zeros(7)}
    pretrained = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.6, 0.7]}
    params, accounts, _ = convert(timm_vit, tensors, settings={"pretrained_cfg": pretrained})
    raw = images * np.asarray(IMAGENET_STD) + np.asarray(IMAGENET_MEAN)
    seen = ((raw - pretrained["mean"]) / pretrained["std"]).astype(np.float32)
    assert models.relative_error(run(params, images)[0], models.encode(seen, tensors)) < TOLERANCE
    assert accounts.skipped == {"head.bias": "the classifier", "head.weight": "the classifier"}
    flagged, _, _ = convert(timm_vit, tensors, pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.5, 0.6, 0.7))
    np.testing.assert_array_equal(flagged["encoder/patch_embed/kernel"], params["encoder/patch_embed/kernel"])


def test_a_position_that_timm_s_class_token_has_not_is_zero() -> None:
    tensors = models.mae(decoder=False)
    tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    found = convert(timm_vit, tensors)[0]["encoder/pos_embed"]
    np.testing.assert_array_equal(found[0, 0], np.zeros(24))
    np.testing.assert_array_equal(found[:, 1:], tensors["pos_embed"])


def test_a_vit_gives_the_features_of_timm(images: np.ndarray, run: Callable[..., Any]) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(img_size=20, patch_size=5, embed_dim=24, depth=2, num_heads=3, num_classes=7)
    with torch.no_grad():
        expected = vit.eval().forward_features(torch.tensor(images).permute(0, 3, 1, 2))
    params, _, _ = convert(timm_vit, vit.state_dict())
    assert models.relative_error(run(params, images)[0], expected) < TOLERANCE


def test_positions_of_another_image_size_are_resized_and_the_model_has_that_size() -> None:
    tensors = models.mae(decoder=False)
    params, accounts, config = convert(mae_facebook, tensors, image_size=35)
    grid = tensors["pos_embed"][:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(7, 7), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(params["encoder/pos_embed"][0, 1:], expected[0].flatten(1).T, atol=1e-5)
    np.testing.assert_array_equal(params["encoder/pos_embed"][0, 0], tensors["pos_embed"][0, 0])
    assert accounts.resized == {"pos_embed": "grid of 4 x 4 to 7 x 7, bicubic"}
    assert config["data.image_size"] == 35
    with pytest.raises(ConfigError, match="`image_size` 33 must be a multiple of the patch size, 5"):
        convert(mae_facebook, tensors, image_size=33)


SIGLIP = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 3}


def siglip_tensors(prefix: str) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (24, 3, 5, 5),
        "embeddings.patch_embedding.bias": (24,),
        "embeddings.position_embedding.weight": (16, 24),
        "post_layernorm.weight": (24,),
        "post_layernorm.bias": (24,),
        "head.probe": (1, 1, 24),
    }
    for number in range(2):
        layer = f"encoder.layers.{number}."
        parts = [(f"self_attn.{part}_proj", 24, 24) for part in ("q", "k", "v", "out")]
        for part, outputs, inputs in (*parts, ("mlp.fc1", 44, 24), ("mlp.fc2", 24, 44)):
            shapes |= {f"{layer}{part}.weight": (outputs, inputs), f"{layer}{part}.bias": (outputs,)}
        shapes |= {f"{layer}layer_norm{k}.{end}": (24,) for k in (1, 2) for end in ("weight", "bias")}
    return {f"{prefix}{name}": tensor for name, tensor in models.random_tensors(shapes).items()}


def siglip_features(tensors: dict[str, Any], images: np.ndarray) -> Any:
    functional = torch.nn.functional
    x = models.patches(torch.tensor(images), tensors, "embeddings.patch_embedding")
    x = x + tensors["embeddings.position_embedding.weight"]
    for layer in ("encoder.layers.0.", "encoder.layers.1."):
        normed = models.norm(x, tensors, f"{layer}layer_norm1")
        query, key, value = (
            models.linear(normed, tensors, f"{layer}self_attn.{part}_proj").unflatten(-1, (3, 8)).transpose(1, 2)
            for part in "qkv"
        )
        mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + models.linear(mixed, tensors, f"{layer}self_attn.out_proj")
        hidden = models.linear(models.norm(x, tensors, f"{layer}layer_norm2"), tensors, f"{layer}mlp.fc1")
        x = x + models.linear(functional.gelu(hidden, approximate="tanh"), tensors, f"{layer}mlp.fc2")
    return models.norm(x, tensors, "post_layernorm")


@pytest.fixture(scope="module")
def run_siglip() -> Callable[[Flat, np.ndarray], np.ndarray]:
    config = VitConfig(image_size=20, patch_size=5, width=24, depth=2, num_heads=3, mlp_width=44)
    model = ModelDef.create(lambda rngs: Siglip(config, rngs=rngs))
    compute = jax.jit(lambda params, images: model.bind(params)(images))
    return lambda params, images: np.asarray(
        compute(traverse_util.unflatten_dict(params, sep="/")["observation"]["images"], jnp.asarray(images))
    )


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_siglip_gives_the_same_features(prefix: str, images: np.ndarray, run_siglip: Callable[..., np.ndarray]) -> None:
    params, accounts, config = convert(siglip, siglip_tensors(prefix), settings={"vision_config": SIGLIP})
    assert models.relative_error(run_siglip(params, images), siglip_features(siglip_tensors(""), images)) < TOLERANCE
    assert accounts.skipped == {f"{prefix}head.probe": "the head that pools"}
    assert config["family"] == "observation" and config["encoder.mlp_width"] == 44


def test_siglip_gives_the_features_of_transformers(
    tmp_path: Path, images: np.ndarray, run_siglip: Callable[..., np.ndarray]
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SiglipVisionConfig(**SIGLIP, image_size=20, patch_size=5, attn_implementation="eager")
    model = transformers.SiglipVisionModel(config).eval()
    randomize(model, {})
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(torch.tensor(images).permute(0, 3, 1, 2)).last_hidden_state
    params, _, _ = convert_file(siglip, tmp_path)
    assert models.relative_error(run_siglip(params, images), expected) < TOLERANCE


def test_files_that_are_other_models_are_refused_by_what_they_lack() -> None:
    tensors = models.mae()
    without_class = {name: tensor for name, tensor in tensors.items() if name != "cls_token"}
    with pytest.raises(RunError, match="has no cls_token, which the encoder here needs; is it a SigLIP"):
        convert(timm_vit, without_class)
    with pytest.raises(RunError, match="no tensor embeddings.patch_embeddings.projection.weight, from which the sizes"):
        convert(mae_huggingface, tensors)
    with pytest.raises(RunError, match="24 numbers cannot be split into 0 heads; set `num_heads`"):
        convert(mae_facebook, tensors, num_heads=0)
    tensors["decoder_pos_embed"] = tensors["decoder_pos_embed"] + 0.1
    with pytest.raises(RunError, match="decoder_pos_embed is not MAE's sine-cosine table"):
        convert(mae_facebook, tensors)
