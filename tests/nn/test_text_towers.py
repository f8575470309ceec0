"""Text towers of public models, against NumPy and, where it is installed, against Hugging Face's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util
from safetensors.numpy import save_file
from scipy.special import erf, log_softmax

from como_jax.errors import ConfigError, RunError
from como_jax.nn.text_towers import TextFeatures, make_text_tower, relative_buckets
from como_jax.spec.towers import TextConfig
from como_jax.weights.text import load_text_tower, text_config_of

Tensors = dict[str, np.ndarray]

CLIP = {
    "model_type": "clip_text_model",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 40,
    "max_position_embeddings": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
T5 = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 40,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-6,
}
GATED_T5 = {**T5, "feed_forward_proj": "gated-gelu"}

# Texts of several lengths, token 0 among them; 39 is the last token of CLIP's.
TEXTS = [[38, 5, 0, 7, 0, 39], [38, 0, 39], [38, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 39]]


def rows(texts: list[list[int]], length: int = 12) -> np.ndarray:
    """As `Observation.text` has them."""
    return np.array([[token + 1 for token in text] + [0] * (length - len(text)) for text in texts], np.int32)


def clip_tensors(config: dict[str, Any] = CLIP, prefix: str = "text_model.") -> Tensors:
    width, hidden = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{i}."
        for name, outputs, inputs in (
            *((f"self_attn.{part}_proj", width, width) for part in ("q", "k", "v", "out")),
            ("mlp.fc1", hidden, width),
            ("mlp.fc2", width, hidden),
        ):
            shapes |= {f"{layer}{name}.weight": (outputs, inputs), f"{layer}{name}.bias": (outputs,)}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{norm}.weight": (width,), f"{layer}{norm}.bias": (width,)}
    return random_tensors({f"{prefix}{name}": shape for name, shape in shapes.items()})


def t5_tensors(config: dict[str, Any]) -> Tensors:
    width, hidden, inner = config["d_model"], config["d_ff"], config["d_kv"] * config["num_heads"]
    relative = (config["relative_attention_num_buckets"], config["num_heads"])
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (config["vocab_size"], width),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": relative,
        "encoder.final_layer_norm.weight": (width,),
    }
    first = ("wi_0", "wi_1") if config["feed_forward_proj"].startswith("gated-") else ("wi",)
    for i in range(config["num_layers"]):
        layer = f"encoder.block.{i}.layer."
        shapes |= {f"{layer}0.SelfAttention.{part}.weight": (inner, width) for part in "qkv"}
        shapes |= {f"{layer}0.SelfAttention.o.weight": (width, inner)}
        shapes |= {f"{layer}{part}.layer_norm.weight": (width,) for part in (0, 1)}
        shapes |= {f"{layer}1.DenseReluDense.{name}.weight": (hidden, width) for name in first}
        shapes |= {f"{layer}1.DenseReluDense.wo.weight": (width, hidden)}
    return random_tensors(shapes)


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    rng = np.random.default_rng(0)
    return {
        name: (0.4 * rng.normal(size=shape) + (len(shape) == 1)).astype(np.float32) for name, shape in shapes.items()
    }


def save(directory: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory / "model.safetensors"


def read(weights: Path, tower: str, text: np.ndarray) -> TextFeatures:
    """Features of a tower with these weights."""
    config = text_config_of(weights, TextConfig(tower=tower, max_length=12))
    module = nnx.eval_shape(lambda: make_text_tower(config, dtype=np.float32, rngs=nnx.Rngs(0)))
    graphdef, shapes = nnx.split(module)
    params = load_text_tower(weights)
    found, wanted = (traverse_util.flatten_dict(tree, sep="/") for tree in (params, nnx.to_pure_dict(shapes)))
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in wanted.items()}
    return jax.jit(lambda params, text: nnx.merge(graphdef, params).read(text))(params, text)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(x, axis=-1))


def numpy_clip(tensors: Tensors, tokens: list[int], activation: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """CLIP's text encoder for one text, head by head, in float64."""
    t = {name.removeprefix("text_model."): tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * t[f"{name}.weight"] + t[f"{name}.bias"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    x = t["embeddings.token_embedding.weight"][tokens] + t["embeddings.position_embedding.weight"][: len(tokens)]
    for i in range(2):
        layer = f"encoder.layers.{i}."
        y = norm(x, f"{layer}layer_norm1")
        query, key, value = (linear(y, f"{layer}self_attn.{part}_proj") for part in "qkv")
        heads = []
        for head in (slice(0, 8), slice(8, 16)):
            logits = query[:, head] @ key[:, head].T / np.sqrt(8)
            logits[np.triu_indices(len(tokens), 1)] = -np.inf
            heads.append(softmax(logits) @ value[:, head])
        x = x + linear(np.concatenate(heads, axis=1), f"{layer}self_attn.out_proj")
        y = activation(linear(norm(x, f"{layer}layer_norm2"), f"{layer}mlp.fc1"))
        x = x + linear(y, f"{layer}mlp.fc2")
    return norm(x, "final_layer_norm")


def numpy_t5(tensors: Tensors, tokens: list[int], *, gated: bool) -> np.ndarray:
    """T5's encoder for one text of at most 8 tokens, head by head, in float64."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * t[f"{name}.weight"]

    def bucket(distance: int) -> int:
        # Of 8 buckets 4 are for what follows; of each 4, two are exact, one reaches up to sqrt(2 * 16) away.
        away = abs(distance)
        return 4 * (distance > 0) + (away if away < 2 else 2 if away < np.sqrt(32) else 3)

    table = t["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    length = range(len(tokens))
    bias = np.array([[table[bucket(key - query)] for key in length] for query in length])
    x = t["shared.weight"][tokens]
    for i in range(2):
        layer = f"encoder.block.{i}.layer."
        y = norm(x, f"{layer}0.layer_norm")
        query, key, value = (y @ t[f"{layer}0.SelfAttention.{part}.weight"].T for part in "qkv")
        heads = []
        for number, head in enumerate((slice(0, 6), slice(6, 12))):
            heads.append(softmax(query[:, head] @ key[:, head].T + bias[..., number]) @ value[:, head])
        x = x + np.concatenate(heads, axis=1) @ t[f"{layer}0.SelfAttention.o.weight"].T
        y, mlp = norm(x, f"{layer}1.layer_norm"), f"{layer}1.DenseReluDense."
        if gated:
            z = y @ t[f"{mlp}wi_0.weight"].T
            tanh = np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
            hidden = 0.5 * z * (1 + tanh) * (y @ t[f"{mlp}wi_1.weight"].T)
        else:
            hidden = np.maximum(y @ t[f"{mlp}wi.weight"].T, 0)
        x = x + hidden @ t[f"{mlp}wo.weight"].T
    return norm(x, "encoder.final_layer_norm")


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("quick_gelu", lambda x: x / (1 + np.exp(-1.702 * x))),
        ("gelu", lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2)))),
    ],
)
def test_clip_is_what_numpy_computes(tmp_path: Path, name: str, activation: Callable) -> None:
    tensors = clip_tensors()
    found = read(save(tmp_path, {**CLIP, "hidden_act": name}, tensors), "clip", rows(TEXTS))
    for row, text in enumerate(TEXTS):
        expected = numpy_clip(tensors, text, activation)
        np.testing.assert_allclose(found.tokens[row, : len(text)], expected, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(found.pooled[row], expected[-1], rtol=2e-4, atol=2e-5)
        np.testing.assert_array_equal(found.mask[row], np.arange(12) < len(text))


@pytest.mark.parametrize("config", [T5, GATED_T5])
def test_t5_is_what_numpy_computes(tmp_path: Path, config: dict[str, Any]) -> None:
    tensors, texts = t5_tensors(config), [[5, 0, 7, 0, 1], [1], [3, 4, 5, 6, 7, 8, 9, 1]]
    found = read(save(tmp_path, config, tensors), "t5", rows(texts))
    for row, text in enumerate(texts):
        expected = numpy_t5(tensors, text, gated=config is GATED_T5)
        np.testing.assert_allclose(found.tokens[row, : len(text)], expected, rtol=2e-4, atol=2e-5)
        np.testing.assert_allclose(found.pooled[row], expected.mean(axis=0), rtol=2e-4, atol=2e-5)
        np.testing.assert_array_equal(found.mask[row], np.arange(12) < len(text))


@pytest.mark.parametrize(("tower", "config"), [("clip", CLIP), ("t5", T5)])
def test_token_zero_is_a_token_and_padding_is_not(tmp_path: Path, tower: str, config: dict[str, Any]) -> None:
    weights = save(tmp_path, config, clip_tensors() if tower == "clip" else t5_tensors(T5))
    plain, longer = (read(weights, tower, rows([[5, 6]], length)) for length in (2, 9))
    np.testing.assert_allclose(longer.tokens[:, :2], plain.tokens, atol=1e-5)
    np.testing.assert_allclose(longer.pooled, plain.pooled, atol=1e-5)
    with_zero = read(weights, tower, rows([[5, 6, 0]], 9))
    assert with_zero.mask.sum() == 3
    assert np.abs(with_zero.pooled - plain.pooled).max() > 0.01


@pytest.mark.parametrize(("tower", "config"), [("clip", CLIP), ("t5", T5)])
def test_a_row_without_any_token_is_finite(tmp_path: Path, tower: str, config: dict[str, Any]) -> None:
    weights = save(tmp_path, config, clip_tensors() if tower == "clip" else t5_tensors(T5))
    found = read(weights, tower, np.zeros((1, 4), np.int32))
    assert all(np.isfinite(x).all() for x in found)
    assert found.mask.any()


def test_distances_fall_into_the_buckets_of_t5() -> None:
    # Of 32 buckets and distances up to 128: 0 to 7 have their own, the eighth begins at 8, the last at about 91.
    found = relative_buckets(np.array([0, -1, -7, -8, -11, -12, -16, -64, -90, -91, -500, 1, 7, 500]), 32, 128)
    np.testing.assert_array_equal(found, [0, 1, 7, 8, 8, 9, 10, 14, 14, 15, 15, 17, 23, 31])


def test_the_text_encoder_is_found_within_the_whole_of_clip(tmp_path: Path) -> None:
    tensors = clip_tensors()
    text_config = {name: value for name, value in CLIP.items() if name not in ("model_type", "hidden_act")}
    rest = {"text_projection.weight": np.ones((8, 16), np.float32), "vision_model.embeddings.x": np.ones(3, np.float32)}
    whole, alone, bare = (tmp_path / name for name in ("whole", "alone", "bare"))
    for directory in (whole, alone, bare):
        directory.mkdir()
    found = [
        read(save(whole, {"model_type": "clip", "text_config": text_config}, {**tensors, **rest}), "clip", rows(TEXTS)),
        read(save(bare, CLIP, clip_tensors(prefix="")), "clip", rows(TEXTS)),
    ]
    expected = read(save(alone, CLIP, tensors), "clip", rows(TEXTS))
    for features in found:
        np.testing.assert_array_equal(features.tokens, expected.tokens)


def test_weights_in_several_files_and_in_bfloat16_are_read(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in t5_tensors(T5).items()}
    save(tmp_path, T5, {})
    files = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    found = load_text_tower(index)
    assert found["token_embed"].dtype == np.float32
    np.testing.assert_array_equal(found["token_embed"], tensors["shared.weight"].astype(np.float32))
    wo = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    np.testing.assert_array_equal(
        found["blocks"]["layers"]["mlp"]["fc2"]["kernel"][1], tensors[wo].astype(np.float32).T
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared.weight": None}, "no tensor shared.weight"),
        ({"encoder.block.1.layer.0.SelfAttention.k.weight": None}, r"no tensor encoder\.block\.1.*k\.weight"),
        ({"encoder.final_layer_norm.weight": (15,)}, r"final_layer_norm\.weight is \(15,\) .* must be \(16,\)"),
        ({"encoder.block.2.layer.1.layer_norm.weight": (16,)}, r"1 tensors more .*encoder\.block\.2"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    changed = {**t5_tensors(T5), **{name: shape and np.zeros(shape, np.float32) for name, shape in change.items()}}
    weights = save(tmp_path, T5, {name: tensor for name, tensor in changed.items() if tensor is not None})
    with pytest.raises(RunError, match=message):
        load_text_tower(weights)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**T5, "model_type": "bert"}, "model_type 'bert' is no text tower; known are clip"),
        ({**T5, "d_model": "16"}, "d_model '16' must be a positive whole number"),
        ({**T5, "feed_forward_proj": "gated-tanh"}, "activation 'gated-tanh' is none of"),
        ({**CLIP, "num_attention_heads": 3}, "hidden_size 16 is no multiple of 3 heads"),
    ],
)
def test_a_config_that_describes_no_tower_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        load_text_tower(save(tmp_path, config, {}))


def test_files_that_are_not_there_or_are_of_another_format_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.json does not exist"):
        load_text_tower(tmp_path / "model.safetensors")
    save(tmp_path, T5, {})
    with pytest.raises(RunError, match=r"t5\.safetensors does not exist"):
        load_text_tower(tmp_path / "t5.safetensors")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(RunError, match=r"model\.bin is not a \.safetensors file; save PyTorch weights"):
        load_text_tower(tmp_path / "model.bin")
    (tmp_path / "half.safetensors").write_bytes(b"\x10")
    with pytest.raises(RunError, match=r"half\.safetensors cannot be read as safetensors"):
        load_text_tower(tmp_path / "half.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json is not JSON"):
        load_text_tower(tmp_path / "model.safetensors")


def test_a_tower_and_its_config_must_agree(tmp_path: Path) -> None:
    weights = save(tmp_path, CLIP, {})
    with pytest.raises(ConfigError, match="of the text tower 'clip', but text.tower is 't5'"):
        text_config_of(weights, TextConfig(tower="t5"))
    with pytest.raises(ConfigError, match="text.tower=t5 needs text.weights, a .safetensors file"):
        text_config_of("", TextConfig(tower="t5"))
    config = text_config_of(weights, TextConfig(tower="clip", max_length=13, frozen=False))
    assert (config.width, config.depth, config.frozen) == (16, 2, False)
    with pytest.raises(ConfigError, match="text.max_length 13 is more than the 12 positions"):
        make_text_tower(config, dtype=np.float32, rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="text.tower=t5 needs text.vocabulary_size"):
        make_text_tower(TextConfig(tower="t5"), dtype=np.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("activation", "whole"), [("quick_gelu", False), ("gelu", True)])
def test_clip_equals_that_of_transformers(tmp_path: Path, activation: str, whole: bool) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {**CLIP, "hidden_act": activation, "bos_token_id": 38, "eos_token_id": 39, "initializer_factor": 5.0}
    config = transformers.CLIPTextConfig(**{name: size for name, size in sizes.items() if name != "model_type"})
    if whole:
        vision = transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=8
        )
        model = transformers.CLIPModel(transformers.CLIPConfig(text_config=config, vision_config=vision)).eval()
        text_model = model.text_model
    else:
        model = text_model = transformers.CLIPTextModel(config).eval()
    model.save_pretrained(tmp_path)
    # Its own padding is the end-of-text token.
    padded = torch.tensor([text + [39] * (12 - len(text)) for text in TEXTS])
    with torch.no_grad():
        expected = text_model(padded)
    found = read(tmp_path / "model.safetensors", "clip", rows(TEXTS))
    mask = np.asarray(found.mask)
    np.testing.assert_allclose(found.tokens[mask], expected.last_hidden_state.numpy()[mask], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.pooled, expected.pooler_output.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [T5, GATED_T5])
def test_t5_equals_that_of_transformers(tmp_path: Path, config: dict[str, Any]) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {name: size for name, size in config.items() if name != "model_type"}
    model = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    texts = [[5, 0, 7, 1], [3, 1], [*range(2, 39), 1]]
    text = rows(texts, 40)
    with torch.no_grad():
        # Its own padding is token 0, told from a token by the mask.
        expected = model(torch.tensor(np.maximum(text - 1, 0)).long(), attention_mask=torch.tensor(text != 0).long())
    found = read(tmp_path / "model.safetensors", "t5", text)
    mask = np.asarray(found.mask)
    np.testing.assert_allclose(found.tokens[mask], expected.last_hidden_state.numpy()[mask], rtol=1e-4, atol=1e-5)


def test_buckets_equal_those_of_transformers() -> None:
    torch, t5 = pytest.importorskip("torch"), pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = np.arange(-600, 601)
    for buckets, farthest in ((32, 128), (8, 16), (64, 256)):
        expected = t5.T5Attention._relative_position_bucket(
            torch.tensor(distance), bidirectional=True, num_buckets=buckets, max_distance=farthest
        )
        np.testing.assert_array_equal(relative_buckets(distance, buckets, farthest), expected)
