"""PaliGemma's weights: the whole model against NumPy and, where it is installed, against Hugging Face's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx, traverse_util
from safetensors.numpy import save_file

from como_jax.errors import RunError
from como_jax.nn.decoder import Decoder
from como_jax.nn.model_def import ModelDef, Params
from como_jax.policies.observation import ObservationEncoder
from como_jax.spec.policies import ObservationConfig
from como_jax.spec.towers import DecoderConfig, TextConfig, VitConfig
from como_jax.types import Observation
from como_jax.weights.paligemma import load_paligemma, paligemma_sizes
from tests.everyday import mostly_slow

Tensors = dict[str, np.ndarray]

# No two sizes are alike, so that no tensor fits where it does not belong.
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
    "vision_use_head": False,
}
TEXT = {
    "model_type": "gemma",
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "vocab_size": 53,
}
IMAGE_TOKEN = 52
CONFIG = {
    "model_type": "paligemma",
    "vision_config": VISION,
    "text_config": TEXT,
    "image_token_index": IMAGE_TOKEN,
    "projection_dim": 20,
    "hidden_size": 20,
    "vocab_size": 53,
}
# Of tower, projector and language model, as versions 4.41, 4.52 and 5 of transformers and a bare model name them.
NAMES = {
    "first": ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model."),
    "second": ("model.vision_tower.vision_model.", "model.multi_modal_projector.", "model.language_model."),
    "third": ("vision_tower.", "multi_modal_projector.", "language_model.model."),
    "fourth": ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model."),
    "bare": ("vision_tower.", "multi_modal_projector.", "language_model."),
}
PROMPTS = np.array([[2, 5, 7, 11, 50, 3], [2, 9, 4, 4, 31, 3]], np.int32)


def make_tensors(names: str = "first") -> Tensors:
    """Random ones, float32."""
    vision, projector, language = NAMES[names]
    width, hidden, patch = VISION["hidden_size"], VISION["intermediate_size"], VISION["patch_size"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{vision}embeddings.patch_embedding.weight": (width, 3, patch, patch),
        f"{vision}embeddings.patch_embedding.bias": (width,),
        f"{vision}embeddings.position_embedding.weight": (16, width),
        f"{projector}linear.weight": (TEXT["hidden_size"], width),
        f"{projector}linear.bias": (TEXT["hidden_size"],),
    }
    norms = [f"{vision}post_layernorm"]
    for i in range(VISION["num_hidden_layers"]):
        layer = f"{vision}encoder.layers.{i}."
        sizes = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
        for name, shape in (sizes | {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}).items():
            shapes |= {f"{layer}{name}.weight": shape, f"{layer}{name}.bias": shape[:1]}
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    width, hidden, size = TEXT["hidden_size"], TEXT["intermediate_size"], TEXT["head_dim"]
    inner = TEXT["num_attention_heads"] * size
    shapes |= {f"{language}embed_tokens.weight": (TEXT["vocab_size"], width), f"{language}norm.weight": (width,)}
    for i in range(TEXT["num_hidden_layers"]):
        layer = f"{language}layers.{i}."
        shapes |= {f"{layer}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}self_attn.q_proj.weight": (inner, width), f"{layer}self_attn.o_proj.weight": (width, inner)}
        shapes |= {f"{layer}self_attn.{part}_proj.weight": (size, width) for part in "kv"}
        shapes |= {f"{layer}mlp.{part}_proj.weight": (hidden, width) for part in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (width, hidden)}
    rng = np.random.default_rng(0)
    return {name: rng.normal(scale=0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}


def save(directory: Path, tensors: Tensors, config: dict[str, Any] = CONFIG) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory / "model.safetensors"


class Reader(nnx.Module):
    """The parts of a policy that read images and instructions."""

    def __init__(self, sizes: dict[str, dict[str, Any]], rngs: nnx.Rngs, **options: Any):
        encoder = dict(sizes["encoder"])
        tower, decoder = encoder.pop("tower"), DecoderConfig(**sizes["model"])
        text = TextConfig(max_length=PROMPTS.shape[1], width=decoder.width, **sizes["text"])
        observation = ObservationConfig(VitConfig(**sizes["data"], **encoder), text, image_tower=tower, **options)
        self.observation = ObservationEncoder(observation, decoder.width, rngs=rngs)
        self.decoder = Decoder(decoder, rngs=rngs)

    def __call__(self, observation: Observation) -> jax.Array:
        """What the decoder gives for all tokens, all of which read each other."""
        tokens, mask = self.observation(observation).context()
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape[:2])
        return self.decoder(tokens, positions, np.repeat(mask[:, None], tokens.shape[1], axis=1))[0]


def make_reader(weights: Path, **options: Any) -> tuple[ModelDef, Params]:
    """A model of the weights' sizes and the shapes of its parameters."""
    sizes = paligemma_sizes(weights)
    model = ModelDef.create(lambda rngs: Reader(sizes, rngs, **options))
    return model, jax.eval_shape(model.init, jax.random.key(0))


def make_images() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, 28, 28, 3), np.uint8)


def read_prompts(weights: Path) -> np.ndarray:
    """Last hidden states `[B, N + M, D]` of a model with the weights."""
    model, shapes = make_reader(weights)
    params = load_paligemma(weights, shapes)
    observation = Observation(
        images=make_images()[:, None, None], has_camera=np.ones((2, 1), np.float32), text=PROMPTS + 1
    )
    return np.asarray(jax.jit(lambda params: model.bind(params)(observation))(params))


def numpy_model(tensors: Tensors, image: np.ndarray, prompt: np.ndarray) -> np.ndarray:
    """Last hidden states of one image and prompt, from tensors named as in "first", in double precision."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ tensors[f"{name}.weight"].T + tensors.get(f"{name}.bias", 0.0)

    def gelu(x: np.ndarray) -> np.ndarray:
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
        scores = np.exp(query @ key.T / np.sqrt(query.shape[-1]))
        return scores / scores.sum(-1, keepdims=True) @ value

    x = numpy_patches(image, tensors)
    for i in range(VISION["num_hidden_layers"]):
        layer = f"vision_tower.vision_model.encoder.layers.{i}."
        normed = layer_norm(x, tensors, f"{layer}layer_norm1")
        parts = [np.split(dense(normed, f"{layer}self_attn.{part}_proj"), 3, axis=-1) for part in "qkv"]
        heads = [attention(*head) for head in zip(*parts, strict=True)]
        x = x + dense(np.concatenate(heads, axis=-1), f"{layer}self_attn.out_proj")
        normed = layer_norm(x, tensors, f"{layer}layer_norm2")
        x = x + dense(gelu(dense(normed, f"{layer}mlp.fc1")), f"{layer}mlp.fc2")
    seen = dense(layer_norm(x, tensors, "vision_tower.vision_model.post_layernorm"), "multi_modal_projector.linear")
    words = tensors["language_model.model.embed_tokens.weight"][prompt] * np.sqrt(TEXT["hidden_size"])
    x = np.concatenate([seen, words])
    for i in range(TEXT["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}."
        normed = rms_norm(x, tensors[f"{layer}input_layernorm.weight"])
        query, key, value = (dense(normed, f"{layer}self_attn.{part}_proj") for part in "qkv")
        heads = [attention(rotated(q), rotated(key), value) for q in np.split(query, 4, axis=-1)]
        x = x + dense(np.concatenate(heads, axis=-1), f"{layer}self_attn.o_proj")
        normed = rms_norm(x, tensors[f"{layer}post_attention_layernorm.weight"])
        gated = gelu(dense(normed, f"{layer}mlp.gate_proj")) * dense(normed, f"{layer}mlp.up_proj")
        x = x + dense(gated, f"{layer}mlp.down_proj")
    return rms_norm(x, tensors["language_model.model.norm.weight"])


def numpy_patches(image: np.ndarray, tensors: Tensors) -> np.ndarray:
    """Patch by patch, the convolution of pixels in [-1, 1], and the positions."""
    size, name = VISION["patch_size"], "vision_tower.vision_model.embeddings."
    pixels = image / 127.5 - 1
    patches = [
        np.einsum(
            "ijc,dcij->d",
            pixels[row : row + size, column : column + size],
            tensors[f"{name}patch_embedding.weight"],
        )
        for row in range(0, len(image), size)
        for column in range(0, len(image), size)
    ]
    return np.stack(patches) + tensors[f"{name}patch_embedding.bias"] + tensors[f"{name}position_embedding.weight"]


def layer_norm(x: np.ndarray, tensors: Tensors, name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-6)
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * (1 + weight)


def rotated(x: np.ndarray) -> np.ndarray:
    """Pairs of numbers as complex ones, turned by angles that grow with the position, which counts from 1."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(1, len(x) + 1), 10_000.0 ** (-np.arange(half) / half))
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_hidden_states_equal_a_forward_pass_in_numpy(tmp_path: Path) -> None:
    tensors = make_tensors()
    found = read_prompts(save(tmp_path, tensors))
    expected = np.stack([numpy_model(tensors, *sample) for sample in zip(make_images(), PROMPTS, strict=True)])
    assert found.shape == (2, 22, 20)
    assert relative_error(found, expected) < 1e-5


def test_hidden_states_and_logits_equal_those_of_transformers(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.PaliGemmaConfig(**CONFIG, attn_implementation="eager")
    model = transformers.PaliGemmaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        prompts = np.concatenate([np.full((2, 16), IMAGE_TOKEN), PROMPTS], axis=1)
        pixels = (make_images().astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)
        expected = model(
            input_ids=torch.tensor(prompts),
            pixel_values=torch.tensor(np.ascontiguousarray(pixels)),
            # All of it is a prefix.
            token_type_ids=torch.zeros(prompts.shape, dtype=torch.long),
            output_hidden_states=True,
        )
    weights = tmp_path / "model.safetensors"
    found = read_prompts(weights)
    table = load_paligemma(weights, make_reader(weights)[1])["observation"]["text"]["table"]
    assert relative_error(found, expected.hidden_states[-1].numpy()) < 1e-5
    assert relative_error(found @ table.T, expected.logits.numpy()) < 1e-5


@pytest.mark.parametrize("names", mostly_slow(NAMES, "first", "bare"))
def test_all_names_of_the_tensors_are_understood(tmp_path: Path, names: str) -> None:
    expected, other = tmp_path / "expected", tmp_path / "other"
    expected.mkdir()
    other.mkdir()
    shapes = make_reader(save(expected, make_tensors()))[1]
    found = load_paligemma(save(other, make_tensors(names)), shapes)
    chex.assert_trees_all_equal(found, load_paligemma(expected / "model.safetensors", shapes))


def test_several_files_of_half_precision_are_read_in_the_dtype_of_the_policy(tmp_path: Path) -> None:
    tensors = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in make_tensors().items()}
    weights = save(tmp_path, tensors)
    shapes = make_reader(weights)[1]
    weights.unlink()
    files = {name: f"model-{1 + number % 2:05}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in files if files[name] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    scale = tensors["language_model.model.layers.2.input_layernorm.weight"]
    for dtype in (np.float32, ml_dtypes.bfloat16):
        wanted = jax.tree.map(lambda x, dtype=dtype: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
        found = load_paligemma(index, wanted)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(dtype)}
        np.testing.assert_array_equal(found["decoder"]["blocks"]["layers"]["norm1"]["scale"][2], scale.astype(dtype))


def test_parameters_lie_where_those_of_the_policy_do(tmp_path: Path) -> None:
    weights = save(tmp_path, make_tensors())
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make_reader(weights)[1])
    assert {leaf.sharding for leaf in jax.tree.leaves(load_paligemma(weights, params))} == {sharding}


def test_what_paligemma_has_not_is_zero_or_left_out(tmp_path: Path) -> None:
    weights = save(tmp_path, make_tensors())
    sizes = paligemma_sizes(weights)
    sizes["model"]["lora_rank"] = 2
    model = ModelDef.create(lambda rngs: Reader(sizes, rngs, state_size=3, cameras=2, instants=3, pool=2))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    found, wanted = (
        {"/".join(path): leaf for path, leaf in traverse_util.flatten_dict(tree).items()}
        for tree in (load_paligemma(weights, shapes), shapes)
    )
    zeros = {
        f"observation/{name}": shape for name, shape in (("image_pos", 4), ("camera_embed", 2), ("instant_embed", 3))
    }
    for name, rows in zeros.items():
        np.testing.assert_array_equal(found[name], np.zeros((rows, 20)))
    left_out = set(wanted) - set(found)
    lora = {name for name in wanted if "lora_" in name}
    assert len(lora) == 14 and left_out == lora | {
        "observation/no_state",
        "observation/state_proj/kernel",
        "observation/state_proj/bias",
    }
    assert {name: leaf.shape for name, leaf in found.items()} == {name: wanted[name].shape for name in found}


def test_sizes_are_those_of_config_json_and_of_its_defaults(tmp_path: Path) -> None:
    weights = save(tmp_path, {})
    assert paligemma_sizes(weights) == {
        "data": {"image_size": 28},
        "encoder": {"tower": "siglip", "patch_size": 7, "width": 24, "depth": 2, "num_heads": 3, "mlp_width": 44},
        "text": {"tower": "tokens", "vocabulary_size": 53},
        "model": {
            "width": 20,
            "depth": 3,
            "num_heads": 4,
            "num_kv_heads": 1,
            "head_size": 10,
            "mlp_width": 36,
            "rope_period": 10_000.0,
            "norm_epsilon": 1e-6,
        },
    }
    text, vision = without(TEXT, "head_dim"), without(VISION, "image_size")
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500}, "rms_norm_eps": 1e-5}
    save(tmp_path, {}, CONFIG | {"text_config": text, "vision_config": vision})
    sizes = paligemma_sizes(weights)
    assert sizes["data"] == {"image_size": 224}
    found = {name: sizes["model"][name] for name in ("head_size", "rope_period", "norm_epsilon")}
    assert found == {"head_size": 256, "rope_period": 500.0, "norm_epsilon": 1e-5}
    assert isinstance(found["rope_period"], float)


def without(section: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != name}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"model_type": "llava"}, "model_type 'llava' is none of paligemma"),
        (without(CONFIG, "vision_config"), "has no vision_config"),
        (CONFIG | {"text_config": TEXT | {"model_type": "gemma2"}}, "model_type 'gemma2' is none of gemma"),
        (CONFIG | {"text_config": without(TEXT, "vocab_size")}, "vocab_size None must be a positive whole number"),
        (CONFIG | {"text_config": TEXT | {"hidden_size": 1.5}}, "hidden_size 1.5 must be a positive whole number"),
        (CONFIG | {"text_config": TEXT | {"rope_scaling": {"rope_type": "yarn"}}}, "rope_type 'yarn' is none of"),
        (CONFIG | {"text_config": TEXT | {"rope_scaling": {"type": "linear"}}}, "type 'linear' is none of default"),
        (CONFIG | {"vision_config": VISION | {"hidden_act": "gelu"}}, "hidden_act 'gelu' is none of gelu_pytorch_tanh"),
        (CONFIG | {"vision_config": VISION | {"num_attention_heads": 5}}, "hidden_size 24 is no multiple of 5 heads"),
    ],
)
def test_a_config_that_describes_no_paligemma_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=rf"config\.json.*{message}"):
        paligemma_sizes(save(tmp_path, {}, config))


def test_weights_without_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.json does not exist: it comes with the weights"):
        paligemma_sizes(tmp_path / "model.safetensors")


TABLE = "language_model.model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({TABLE: None}, f"no tensor {TABLE}"),
        ({"language_model.model.layers.1.mlp.up_proj.weight": None}, r"no tensor .*layers\.1\.mlp\.up_proj\.weight"),
        ({TABLE: (53, 19)}, r"embed_tokens\.weight is \(53, 19\) and by config\.json must be \(53, 20\)"),
        ({"language_model.model.layers.3.mlp.up_proj.weight": (36, 20)}, r"1 tensors more .*layers\.3\.mlp\.up_proj"),
        ({"vision_tower.vision_model.head.probe": (1, 1, 24)}, "1 tensors more .*vision_model.head.probe"),
        ({"lm_head.weight": (53, 20)}, "lm_head.weight is not language_model.model.embed_tokens.weight; .* are tied"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    changed = {**make_tensors(), **{name: shape and np.zeros(shape, np.float32) for name, shape in change.items()}}
    weights = save(tmp_path, {name: tensor for name, tensor in changed.items() if tensor is not None})
    with pytest.raises(RunError, match=message):
        load_paligemma(weights, make_reader(weights)[1])


def test_a_head_that_is_the_table_once_more_is_accepted(tmp_path: Path) -> None:
    tensors = make_tensors("fourth")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].copy()
    weights = save(tmp_path, tensors)
    found = load_paligemma(weights, make_reader(weights)[1])
    np.testing.assert_array_equal(found["observation"]["text"]["table"], tensors["lm_head.weight"])


def test_a_policy_of_other_sizes_is_refused_by_the_parameter_s_name(tmp_path: Path) -> None:
    weights = save(tmp_path, make_tensors())
    shapes = traverse_util.flatten_dict(make_reader(weights)[1])
    other, missing = dict(shapes), dict(shapes)
    key = ("decoder", "blocks", "layers", "attn", "q", "kernel")
    other[key] = jax.ShapeDtypeStruct((3, 20, 4, 11), np.float32)
    del missing[("observation", "images", "patch_embed", "kernel")]
    with pytest.raises(RunError, match=r"layers/attn/q/kernel is \(3, 20, 4, 10\) and in the policy \(3, 20, 4, 11\)"):
        load_paligemma(weights, traverse_util.unflatten_dict(other))
    with pytest.raises(RunError, match=r"images/patch_embed/kernel, which the policy lacks; .*encoder\.tower=siglip"):
        load_paligemma(weights, traverse_util.unflatten_dict(missing))
