"""LPIPS from files of weights, against a plain NumPy computation and, where it is installed, the lpips package."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from como_jax.errors import ConfigError, RunError
from como_jax.motion.perceptual import NETWORKS, Lpips, feature_distance, load_perceptual
from como_jax.nn.model_def import ModelDef
from como_jax.spec.images import IMAGENET_MEAN, IMAGENET_STD

# By torchvision's number of the convolution: kernel, stride, padding and pooling before it; channels of VGG16.
ALEXNET = {0: (11, 4, 2, 0), 3: (5, 1, 2, 3), 6: (3, 1, 1, 3), 8: (3, 1, 1, 0), 10: (3, 1, 1, 0)}
CHANNELS = {"alexnet": [64, 192, 384, 256, 256], "vgg16": [64, 128, 256, 512, 512]}
VGG16 = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}
VGG16_TAPS, VGG16_POOLED = (2, 7, 14, 21, 28), (5, 10, 17, 24)


def torchvision_weights(network: str) -> dict[str, np.ndarray]:
    """Random weights under the names of torchvision and of lpips' channel weights."""
    rng, previous, found = np.random.default_rng(0), 3, {"classifier.6.weight": np.zeros((2, 2), np.float32)}
    sizes = VGG16 if network == "vgg16" else dict(zip(ALEXNET, CHANNELS["alexnet"], strict=True))
    for index, channels in sizes.items():
        kernel = 3 if network == "vgg16" else ALEXNET[index][0]
        scale = np.sqrt(2 / (previous * kernel**2))
        kernels = rng.standard_normal((channels, previous, kernel, kernel), np.float32)
        found[f"features.{index}.weight"] = np.float32(scale) * kernels
        found[f"features.{index}.bias"] = rng.normal(0, 0.1, channels)
        previous = channels
    for number, channels in enumerate(CHANNELS[network]):
        found[f"lin{number}.model.1.weight"] = rng.uniform(0, 1, (1, channels, 1, 1))
    return {name: value.astype(np.float32) for name, value in found.items()}


def windows(x: np.ndarray, size: int, stride: int) -> np.ndarray:
    view = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
    return view[:, :, ::stride, ::stride]


def convolve(x: np.ndarray, weights: dict[str, np.ndarray], index: int, stride: int, padding: int) -> np.ndarray:
    kernel, bias = weights[f"features.{index}.weight"], weights[f"features.{index}.bias"]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    x = np.einsum("bcijkl,ockl->boij", windows(x, kernel.shape[-1], stride), kernel, optimize=True)
    return np.maximum(x + bias[:, None, None], 0)


def numpy_features(x: np.ndarray, weights: dict[str, np.ndarray], network: str) -> list[np.ndarray]:
    found = []
    for index in VGG16 if network == "vgg16" else ALEXNET:
        if network == "vgg16":
            stride, padding, pool = 1, 1, 2 if index in VGG16_POOLED else 0
        else:
            _, stride, padding, pool = ALEXNET[index]
        if pool:
            x = windows(x, pool, 2).max(axis=(-2, -1))
        x = convolve(x, weights, index, stride, padding)
        if network == "alexnet" or index in VGG16_TAPS:
            found.append(x)
    return found


def numpy_lpips(a: np.ndarray, b: np.ndarray, weights: dict[str, np.ndarray], network: str) -> np.ndarray:
    total = 0.0
    pairs = zip(*(numpy_features(x.transpose(0, 3, 1, 2), weights, network) for x in (a, b)), strict=True)
    for number, pair in enumerate(pairs):
        a, b = (x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-10) for x in pair)
        lin = weights[f"lin{number}.model.1.weight"].reshape(-1, 1, 1)
        total = total + np.sum(lin * (a - b) ** 2, axis=1).mean(axis=(1, 2))
    return total


def save(path: Path, weights: dict[str, np.ndarray]) -> Path:
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, **weights)
        path.write_bytes(buffer.getvalue())
    else:
        path.write_bytes(safetensors.numpy.save(weights))
    return path


def images(size: int, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.random.default_rng(1).normal(size=(2, count, size, size, 3)).astype(np.float32)
    return a, b


def make_distance(network: str, **arguments: Any) -> tuple[ModelDef, Callable[..., jax.Array]]:
    model = ModelDef.create(lambda rngs: Lpips(network, rngs=rngs, **arguments))
    return model, jax.jit(lambda params, a, b: model.bind(params)(a, b))


@pytest.mark.parametrize(("network", "size", "suffix"), [("alexnet", 35, ".npz"), ("vgg16", 16, ".safetensors")])
def test_distances_equal_a_numpy_computation_from_the_same_file(
    tmp_path: Path, network: str, size: int, suffix: str
) -> None:
    weights, (a, b) = torchvision_weights(network), images(size)
    params = load_perceptual(save(tmp_path / f"weights{suffix}", weights), network)
    model, distance = make_distance(network)
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(model.init, jax.random.key(0)))
    assert jax.tree.map(lambda x: x.shape, params) == shapes
    found = distance(params, a, b)
    np.testing.assert_allclose(found, numpy_lpips(a, b, weights, network), rtol=1e-4)
    np.testing.assert_allclose(found, distance(params, b, a), rtol=1e-5)
    np.testing.assert_allclose(distance(params, a, a), 0.0, atol=1e-6)
    assert np.all(found > 0.01)


@pytest.mark.parametrize(("net", "network", "size"), [("alex", "alexnet", 35), ("vgg", "vgg16", 32)])
def test_distances_equal_the_lpips_package(tmp_path: Path, net: str, network: str, size: int) -> None:
    torch, lpips, files = (pytest.importorskip(name) for name in ("torch", "lpips", "safetensors.torch"))
    torch.manual_seed(0)
    theirs = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    for lin in theirs.lins:
        torch.nn.init.uniform_(lin.model[1].weight)
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    files.save_file(tensors, tmp_path / "weights.safetensors")

    a, b = np.random.default_rng(0).uniform(size=(2, 3, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(*(torch.from_numpy(2 * x.transpose(0, 3, 1, 2) - 1) for x in (a, b))).flatten().numpy()
    params = load_perceptual(tmp_path / "weights.safetensors", network)
    found = make_distance(network)[1](params, *((x - IMAGENET_MEAN) / IMAGENET_STD for x in (a, b)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def lpips_name(name: str) -> str:
    slices = {"0": 1, "3": 2, "6": 3, "8": 4, "10": 5}
    return re.sub(r"^features\.(\d+)", lambda m: f"net.slice{slices[m[1]]}.{m[1]}", name)


NAMINGS: dict[str, Callable[[str], list[str]]] = {
    "torchvision": lambda name: [name],
    "lpips": lambda name: [lpips_name(name)],
    "lpips, channel weights in a list": lambda name: [re.sub(r"^lin(\d)", r"lins.\1", lpips_name(name))],
    "lpips, whole state": lambda name: [lpips_name(name), re.sub(r"^lin(\d)", r"lins.\1", lpips_name(name))],
    "lpips without dropout": lambda name: [lpips_name(name).replace("model.1", "model.0")],
    "wrapped": lambda name: [f"module.{name}"],
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_both_formats_and_all_names_give_the_same_parameters(tmp_path: Path, suffix: str) -> None:
    weights = torchvision_weights("alexnet")
    for naming, names in NAMINGS.items():
        renamed = {new: value for name, value in weights.items() for new in names(name)}
        params = load_perceptual(save(tmp_path / f"weights{suffix}", renamed), "alexnet")
        assert sorted(params) == ["conv0", "conv10", "conv3", "conv6", "conv8", *(f"lin{n}" for n in range(5))], naming
        for index in ALEXNET:
            kernel = params[f"conv{index}"]["kernel"].transpose(3, 2, 0, 1)
            np.testing.assert_array_equal(kernel, weights[f"features.{index}.weight"])
            np.testing.assert_array_equal(params[f"conv{index}"]["bias"], weights[f"features.{index}.bias"])
        for number in range(5):
            np.testing.assert_array_equal(params[f"lin{number}"], weights[f"lin{number}.model.1.weight"].ravel())


def test_half_precision_files_and_convolutions_give_float32_distances_close_by(tmp_path: Path) -> None:
    weights, (a, b) = torchvision_weights("alexnet"), images(35)
    halves = {name: value.astype(np.float16) for name, value in weights.items()}
    params = load_perceptual(save(tmp_path / "weights.safetensors", halves), "alexnet")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    found = make_distance("alexnet", dtype=jnp.bfloat16)[1](params, a, b)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, numpy_lpips(a, b, weights, "alexnet"), rtol=0.03)


def test_without_channel_weights_all_channels_weigh_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = {name: value for name, value in torchvision_weights("alexnet").items() if not name.startswith("lin")}
    params = load_perceptual(save(tmp_path / "weights.npz", weights), "alexnet")
    np.testing.assert_array_equal(params["lin3"], np.ones(256))
    assert "no channel weights" in caplog.text


def test_the_gradient_points_to_the_prediction_and_is_finite_where_nothing_differs(tmp_path: Path) -> None:
    params = load_perceptual(save(tmp_path / "weights.npz", torchvision_weights("alexnet")), "alexnet")
    a, b = images(32)
    b[1] = a[1]
    # A ReLU that never fires has no direction.
    params["conv10"]["bias"] = params["conv10"]["bias"] - 1e6
    _, distance = make_distance("alexnet")
    total, gradient = jax.value_and_grad(lambda a: jnp.sum(distance(params, a, b)))(a)
    assert np.isfinite(total)
    assert np.all(np.isfinite(gradient))
    assert np.abs(gradient[0]).max() > 1e-5
    np.testing.assert_allclose(gradient[1], 0.0, atol=1e-7)


def test_feature_distance_compares_directions() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    cosine = np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(feature_distance(a, b), np.mean(2 - 2 * cosine, axis=-1), rtol=1e-4)


def test_feature_distance_has_a_finite_gradient_at_zero_and_equal_tokens() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 2, 5, 4)).astype(np.float32)
    a[0, 0], a[0, 1], b[0, 1], a[0, 2] = 0.0, 0.0, 0.0, b[0, 2]
    gradient = np.asarray(jax.jit(jax.grad(lambda a: jnp.sum(feature_distance(a, b))))(a))
    assert np.all(np.isfinite(gradient))
    np.testing.assert_allclose(gradient[0, 1:3], 0.0, atol=1e-6)
    assert np.all(np.abs(gradient[1]).max(axis=-1) > 1e-3)


def broken(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    weights = torchvision_weights("alexnet") | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in weights.items() if value is not None}


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("none.npz", None, "none.npz does not exist"),
        ("weights.pth", {}, "neither .safetensors nor .npz; save PyTorch weights as safetensors first"),
        ("a.npz", {"features__3__bias": None}, "a.npz has no tensor features.3.bias"),
        ("b.npz", {"features__6__weight": np.zeros((2, 3), np.float32)}, r"\(2, 3\) and must be \(384, 192, 3, 3\)"),
        ("c.npz", {"lin4__model__1__weight": None}, "c.npz has no tensor lin4.model.1.weight"),
        (
            "d.safetensors",
            {"net__slice1__0__bias": np.zeros(64, np.float32)},
            "two different tensors features.0.bias, one of them as net.slice1.0.bias; leave one out",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, name: str, weights: dict | None, message: str) -> None:
    path = tmp_path / name
    if name.endswith(".pth"):
        path.write_bytes(b"")
    elif weights is not None:
        save(path, broken(**weights))
    with pytest.raises(RunError, match=message):
        load_perceptual(path, "alexnet")


@pytest.mark.parametrize("name", ["weights.npz", "weights.safetensors"])
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, {"features.0.bias": np.zeros(64, np.float32)})
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(RunError, match=f"{name} cannot be read: it must be a whole"):
        load_perceptual(path, "alexnet")


def test_weights_of_another_network_are_refused_with_both_shapes(tmp_path: Path) -> None:
    path = save(tmp_path / "weights.npz", torchvision_weights("alexnet"))
    message = "tensor features.0.weight is (64, 3, 11, 11) and must be (64, 3, 3, 3)"
    with pytest.raises(RunError, match=re.escape(message)):
        load_perceptual(path, "vgg16")


def test_an_unknown_network_is_refused() -> None:
    message = "model.perceptual_space 'resnet' has no network; choose one of vgg16, alexnet"
    with pytest.raises(ConfigError, match=message):
        Lpips("resnet", rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=message):
        load_perceptual("weights.npz", "resnet")


@pytest.mark.parametrize(("network", "smallest"), zip(NETWORKS, (16, 31), strict=True))
def test_images_may_be_as_small_as_one_position_and_not_smaller(network: str, smallest: int) -> None:
    model, distance = make_distance(network)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def shape(size: int) -> tuple[int, ...]:
        image = jax.ShapeDtypeStruct((1, size, 64, 3), jnp.float32)
        return jax.eval_shape(distance, params, image, image).shape

    assert shape(smallest) == (1,)
    message = f"data.image_size must be at least {smallest} for the perceptual loss of {network}"
    with pytest.raises(ConfigError, match=message):
        shape(smallest - 1)
