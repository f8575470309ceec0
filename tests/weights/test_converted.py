"""Weights that become a file of safetensors: perceptual networks and text towers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from como_jax.errors import RunError
from como_jax.motion.perceptual import LAYOUTS, load_perceptual
from como_jax.weights.importing import Options, import_parameters
from como_jax.weights.perceptual import lpips, torchvision
from como_jax.weights.tensors import Weights
from como_jax.weights.text import load_text_tower
from tools.import_weights import USES, import_weights, load_recipe


def alexnet(names: str = "features.{index}") -> dict[str, np.ndarray]:
    rng, channels, tensors = np.random.default_rng(0), 3, {}
    for number, spec in enumerate(LAYOUTS["alexnet"]):
        name = names.format(index=spec.index, number=number + 1)
        tensors[f"{name}.weight"] = rng.normal(size=(spec.channels, channels, spec.kernel, spec.kernel))
        tensors[f"{name}.bias"] = rng.normal(size=spec.channels)
        channels = spec.channels
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def channel_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        f"lin{number}.model.1.weight": rng.uniform(size=(1, spec.channels, 1, 1)).astype(np.float32)
        for number, spec in enumerate(LAYOUTS["alexnet"])
    }


def test_pytorch_files_of_alexnet_and_lpips_become_one_that_the_loss_reads(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    files = {"alexnet": alexnet() | {"classifier.1.weight": np.ones((2, 2), np.float32)}, "lin": channel_weights()}
    for name, tensors in files.items():
        torch.save({key: torch.tensor(value) for key, value in tensors.items()}, tmp_path / f"{name}.pth")
    sources = [tmp_path / "alexnet.pth", tmp_path / "lin.pth"]
    imported = import_weights("lpips", sources, tmp_path / "out", Options(), load_recipe)
    found = load_perceptual(tmp_path / "out" / "model.safetensors", "alexnet")
    np.testing.assert_array_equal(found["conv3"]["kernel"], alexnet()["features.3.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(found["lin2"], channel_weights()["lin2.model.1.weight"].reshape(-1))
    assert imported.accounts.skipped == {"classifier.1.weight": "the classifier"}
    assert imported.family == "alexnet" and "perceptual_file={out}/model.safetensors" in USES["alexnet"]
    report = json.loads((tmp_path / "out" / "import_report.json").read_text())
    assert [file["name"] for file in report["files"]] == ["alexnet.pth", "lin.pth"]


def test_the_state_of_lpips_has_all_weights_of_channels_twice() -> None:
    tensors = alexnet("net.slice{number}.{index}") | channel_weights()
    twice = {name.replace("lin", "lins."): value for name, value in channel_weights().items()}
    shift = {"scaling_layer.shift": np.zeros(3), "scaling_layer.scale": np.ones(3)}
    whole = weights({**tensors, **twice, **shift})
    params, accounts = import_parameters(whole, lpips(whole, Options()))
    assert params.keys() == (alexnet() | channel_weights()).keys()
    assert len(accounts.loaded) == 15 and len(accounts.skipped) == 7
    twice["lins.1.model.1.weight"] = twice["lins.1.model.1.weight"] + 1
    with pytest.raises(RunError, match=r"two different tensors, lin1\.model\.1\.weight and lins\.1"):
        lpips(weights({**tensors, **twice}), Options())


def test_the_network_is_known_by_its_first_kernel() -> None:
    assert torchvision(weights(alexnet()), Options()).family == "alexnet"
    first = alexnet() | {"features.0.weight": np.zeros((64, 3, 7, 7))}
    with pytest.raises(RunError, match=r"is none of vgg16, alexnet: its first kernel is \(64, 3, 7, 7\)"):
        torchvision(weights(first), Options())


def test_the_networks_of_lpips_are_read(tmp_path: Path) -> None:
    package, torch = pytest.importorskip("lpips"), pytest.importorskip("torch")
    network = package.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
    torch.save(network.state_dict(), tmp_path / "alex.pth")
    import_weights("lpips", [tmp_path / "alex.pth"], tmp_path / "out", Options(), load_recipe)
    found = load_perceptual(tmp_path / "out" / "model.safetensors", "alexnet")
    expected = network.lin3.model[1].weight.detach().numpy().reshape(-1)
    np.testing.assert_array_equal(found["lin3"], expected)


def weights(tensors: dict[str, Any]) -> Weights:
    return Weights(epath.Path("weights.pth"), tensors)


CLIP = {
    "model_type": "clip",
    "text_config": {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "vocab_size": 11,
        "max_position_embeddings": 5,
    },
}
T5 = {"model_type": "t5", "d_model": 8, "num_layers": 2, "num_heads": 2, "d_kv": 3, "d_ff": 12, "vocab_size": 11}


def clip_tensors() -> dict[str, np.ndarray]:
    shapes: dict[str, tuple[int, ...]] = {
        "text_model.embeddings.token_embedding.weight": (11, 8),
        "text_model.embeddings.position_embedding.weight": (5, 8),
        "text_model.embeddings.position_ids": (1, 5),
        "text_model.final_layer_norm.weight": (8,),
        "text_model.final_layer_norm.bias": (8,),
        "text_projection.weight": (6, 8),
        "vision_model.post_layernorm.weight": (4,),
        "logit_scale": (),
    }
    for layer in ("text_model.encoder.layers.0.", "text_model.encoder.layers.1."):
        for part, outputs, inputs in (
            *((f"self_attn.{part}_proj", 8, 8) for part in ("q", "k", "v", "out")),
            ("mlp.fc1", 12, 8),
            ("mlp.fc2", 8, 12),
        ):
            shapes |= {f"{layer}{part}.weight": (outputs, inputs), f"{layer}{part}.bias": (outputs,)}
        shapes |= {f"{layer}layer_norm{number}.{end}": (8,) for number in (1, 2) for end in ("weight", "bias")}
    return random(shapes)


def t5_tensors() -> dict[str, np.ndarray]:
    relative = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (11, 8), relative: (32, 2)}
    shapes |= {"encoder.embed_tokens.weight": (11, 8), "lm_head.weight": (11, 8)}
    shapes |= {"encoder.final_layer_norm.weight": (8,)}
    for block in ("encoder.block.0.layer.", "encoder.block.1.layer."):
        shapes |= {f"{block}0.SelfAttention.{part}.weight": (6, 8) for part in "qkv"}
        shapes |= {f"{block}0.SelfAttention.o.weight": (8, 6)}
        shapes |= {f"{block}1.DenseReluDense.wi.weight": (12, 8), f"{block}1.DenseReluDense.wo.weight": (8, 12)}
        shapes |= {f"{block}{number}.layer_norm.weight": (8,) for number in (0, 1)}
    return random(shapes)


def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(("name", "config", "skipped"), [("clip-text", CLIP, 4), ("t5-encoder", T5, 2)])
def test_pytorch_files_of_text_towers_become_what_their_readers_know(
    tmp_path: Path, name: str, config: dict[str, Any], skipped: int
) -> None:
    torch = pytest.importorskip("torch")
    tensors = clip_tensors() if name == "clip-text" else t5_tensors()
    source, expected = tmp_path / "source", tmp_path / "expected"
    for folder in (source, expected):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    torch.save({key: torch.tensor(value) for key, value in tensors.items()}, source / "pytorch_model.bin")
    save_file(tensors, expected / "model.safetensors")
    imported = import_weights(name, [source], tmp_path / "out", Options(), load_recipe)
    found, wanted = (load_text_tower(path / "model.safetensors") for path in (tmp_path / "out", expected))
    np.testing.assert_equal(found, wanted)
    assert len(imported.accounts.skipped) == skipped
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == len(tensors) - skipped
    assert imported.family.startswith(name[:2]) and "text.weights={out}/model.safetensors" in USES[imported.family]


def test_a_text_tower_without_config_is_refused(tmp_path: Path) -> None:
    save_file(clip_tensors(), tmp_path / "model.safetensors")
    with pytest.raises(RunError, match=r"config\.json does not exist: it comes with the weights"):
        import_weights("clip-text", [tmp_path], tmp_path / "out", Options(), load_recipe)
    assert not (tmp_path / "out").exists()
