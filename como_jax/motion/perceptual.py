"""Perceptual distance (LPIPS, arXiv 1801.03924): images compared by the features of a network trained on images.

    d(a, b) = sum over taps of the mean over positions of w . (f(a) / |f(a)| - f(b) / |f(b)|)^2

with features f and channel weights w. `Lpips` is the network; `load_perceptual` reads its weights.

Axes: B batch, H and W pixels or positions, C channels, N tokens, D width.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import nnx

from como_jax.errors import ConfigError, RunError

logger = logging.getLogger(__name__)

# Added to the squared length, under the root. The released code adds it to the length instead, and its gradient is NaN
# where all features of a position are 0, as they often are after a ReLU. Lengths above 1e-3 differ by at most 5e-5.
EPSILON = 1e-10


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """One convolution of a feature network and the pooling before it.

    Attributes:
      index: its number among torchvision's modules, which names it in files of weights.
      channels, kernel, stride, padding: of the convolution.
      pool: side of the max pooling of stride two before it; 0 for none.
      tap: whether its features are compared, after the ReLU.
    """

    index: int
    channels: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    tap: bool = False


# VGG16 is configuration D of arXiv 1409.1556, compared after relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3. AlexNet is
# the one of arXiv 1404.5997, compared after every convolution.
LAYOUTS: dict[str, tuple[ConvSpec, ...]] = {
    "vgg16": (
        ConvSpec(0, 64),
        ConvSpec(2, 64, tap=True),
        ConvSpec(5, 128, pool=2),
        ConvSpec(7, 128, tap=True),
        ConvSpec(10, 256, pool=2),
        ConvSpec(12, 256),
        ConvSpec(14, 256, tap=True),
        ConvSpec(17, 512, pool=2),
        ConvSpec(19, 512),
        ConvSpec(21, 512, tap=True),
        ConvSpec(24, 512, pool=2),
        ConvSpec(26, 512),
        ConvSpec(28, 512, tap=True),
    ),
    "alexnet": (
        ConvSpec(0, 64, kernel=11, stride=4, padding=2, tap=True),
        ConvSpec(3, 192, kernel=5, padding=2, pool=3, tap=True),
        ConvSpec(6, 384, pool=3, tap=True),
        ConvSpec(8, 256, tap=True),
        ConvSpec(10, 256, tap=True),
    ),
}
NETWORKS = tuple(LAYOUTS)


class Lpips(nnx.Module):
    """LPIPS over VGG16 or AlexNet, with parameters `conv<torchvision's number>/{kernel, bias}` and `lin<tap>`.

    They are random until those of `load_perceptual` replace them.

    The released networks take pixels in [-1, 1], subtract (-.030, -.088, -.188) and divide by (.458, .448, .450). For
    pixels x in [0, 1] that is (2 x - 1 + .030) / .458 = (x - .485) / .229, and (x - .456) / .224, (x - .406) / .225:
    ImageNet's normalisation, which frames already have here.
    """

    def __init__(self, network: str, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs):
        self.network = network
        channels = 3
        for spec in _layout(network):
            conv = nnx.Conv(
                channels,
                spec.channels,
                (spec.kernel, spec.kernel),
                strides=spec.stride,
                padding=spec.padding,
                kernel_init=nnx.initializers.he_normal(),
                dtype=dtype,
                rngs=rngs,
            )
            setattr(self, f"conv{spec.index}", conv)
            channels = spec.channels
        for number, spec in enumerate(_taps(network)):
            setattr(self, f"lin{number}", nnx.Param(jnp.ones(spec.channels)))

    def __call__(self, prediction: jax.Array, target: jax.Array) -> jax.Array:
        """Distances `[B]`, float32, of ImageNet-normalised images `[B, H, W, 3]`.

        Raises:
          ConfigError: the images are too small for the network.
        """
        chex.assert_shape([prediction, target], (None, None, None, 3))
        chex.assert_equal_shape([prediction, target])
        smallest = _smallest_size(self.network)
        if min(prediction.shape[1:3]) < smallest:
            raise ConfigError(f"data.image_size must be at least {smallest} for the perceptual loss of {self.network}.")
        # One image at a time, so that the backward pass skips a target without gradient.
        pairs = zip(self._features(prediction), self._features(target), strict=True)
        return sum(_distance(a, b, getattr(self, f"lin{number}")[...]) for number, (a, b) in enumerate(pairs))

    def _features(self, x: jax.Array) -> list[jax.Array]:
        found = []
        for spec in _layout(self.network):
            if spec.pool:
                x = nnx.max_pool(x, (spec.pool, spec.pool), strides=(2, 2))
            x = jax.nn.relu(getattr(self, f"conv{spec.index}")(x))
            if spec.tap:
                found.append(x)
        return found


def feature_distance(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """The same distance without channel weights, float32 `[B]`, between token features `[B, N, D]` of any encoder."""
    chex.assert_rank([prediction, target], 3)
    chex.assert_equal_shape([prediction, target])
    return _distance(prediction, target, 1.0)


def load_perceptual(path: epath.PathLike, network: str) -> dict[str, Any]:
    """Parameters of `Lpips` from a file of weights, as nested float32 arrays.

    Convolutions have the names of torchvision (`features.0.weight`) or of lpips (`net.slice1.0.weight`), and channel
    weights those of lpips (`lin0.model.1.weight` or `lins.0.model.1.weight`); without the latter all channels weigh 1.
    Prefixes such as `module.` do not matter, and other tensors are ignored.

    PyTorch's own files are pickles, which are never read. Convert them once, where PyTorch is installed:

        import lpips, safetensors.torch
        tensors = lpips.LPIPS(net="vgg").state_dict()  # Or net="alex", or torch.load("vgg16.pth", weights_only=True).
        safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, "vgg16.safetensors")

    Args:
      path: of a .safetensors or .npz file.
      network: one of `NETWORKS`.

    Raises:
      ConfigError: no such network.
      RunError: there is no such file, it has another format, or a tensor is missing, has another shape or occurs twice.
    """
    layout, path = _layout(network), epath.Path(path)
    tensors = _standard_names(_read(path), path)
    params: dict[str, Any] = {}
    channels = 3
    for spec in layout:
        shape = (spec.channels, channels, spec.kernel, spec.kernel)
        kernel = _take(tensors, f"features.{spec.index}.weight", shape, path)
        bias = _take(tensors, f"features.{spec.index}.bias", (spec.channels,), path)
        params[f"conv{spec.index}"] = {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}
        channels = spec.channels
    has_weights = any(name.startswith("lin") for name in tensors)
    if not has_weights:
        logger.warning("%s has no channel weights (lin0.model.1.weight, ...), so all channels weigh the same.", path)
    for number, spec in enumerate(_taps(network)):
        name, shape = f"lin{number}.model.1.weight", (1, spec.channels, 1, 1)
        lin = _take(tensors, name, shape, path) if has_weights else np.ones(shape, np.float32)
        params[f"lin{number}"] = lin.reshape(-1)
    return params


def _layout(network: str) -> tuple[ConvSpec, ...]:
    if network not in LAYOUTS:
        raise ConfigError(f"model.perceptual_space {network!r} has no network; choose one of {', '.join(NETWORKS)}.")
    return LAYOUTS[network]


def _taps(network: str) -> list[ConvSpec]:
    return [spec for spec in _layout(network) if spec.tap]


def _smallest_size(network: str) -> int:
    """Side of the smallest image that leaves one position after the last layer."""
    size = 1
    for spec in reversed(_layout(network)):
        size = max((size - 1) * spec.stride + spec.kernel - 2 * spec.padding, 1)
        if spec.pool:
            size = (size - 1) * 2 + spec.pool
    return size


def _distance(a: jax.Array, b: jax.Array, weights: jax.Array | float) -> jax.Array:
    """Weighted squared difference `[B]` of the directions of features `[B, ..., C]`, averaged over positions."""
    squared = jnp.sum(weights * jnp.square(_unit(a) - _unit(b)), axis=-1)
    return jnp.mean(squared.reshape(len(squared), -1), axis=1)


def _unit(features: jax.Array) -> jax.Array:
    """Float32 features whose channels have length one at every position."""
    features = features.astype(jnp.float32)
    return features * jax.lax.rsqrt(jnp.sum(jnp.square(features), axis=-1, keepdims=True) + EPSILON)


def _read(path: epath.Path) -> Mapping[str, np.ndarray]:
    if path.suffix not in (".safetensors", ".npz"):
        raise RunError(
            f"model.perceptual_file {path} is neither .safetensors nor .npz; save PyTorch weights as safetensors "
            "first, as como_jax.motion.perceptual.load_perceptual describes."
        )
    if not path.is_file():
        raise RunError(f"model.perceptual_file {path} does not exist.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.numpy.load(path.read_bytes())
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            return dict(file)
    except (safetensors.SafetensorError, zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"model.perceptual_file {path} cannot be read: it must be a whole {path.suffix} file of float16 or float32 "
            f"tensors ({type(error).__name__})."
        ) from error


_CONV_NAME = re.compile(r"(?:^|\.)(?:features|slice\d)\.(\d+\.(?:weight|bias))$")
_LIN_NAME = re.compile(r"(?:^|\.)lins?\.?(\d)\.model\.\d\.weight$")


def _standard_names(tensors: Mapping[str, np.ndarray], path: epath.Path) -> dict[str, np.ndarray]:
    """The tensors of convolutions and channel weights under their names in torchvision and lpips."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0]):
        if conv := _CONV_NAME.search(name):
            standard = f"features.{conv[1]}"
        elif lin := _LIN_NAME.search(name):
            standard = f"lin{lin[1]}.model.1.weight"
        else:
            continue
        # lpips gives its channel weights two names.
        if standard in found and not np.array_equal(found[standard], tensor):
            raise RunError(f"{path} holds two different tensors {standard}, one of them as {name}; leave one out.")
        found[standard] = tensor
    return found


def _take(tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], path: epath.Path) -> np.ndarray:
    if name not in tensors:
        raise RunError(f"{path} has no tensor {name}, which the perceptual network needs.")
    if tensors[name].shape != shape:
        raise RunError(f"{path}: tensor {name} is {tensors[name].shape} and must be {shape}.")
    return np.asarray(tensors[name], np.float32)
