"""Networks of perceptual losses: VGG16 and AlexNet as torchvision saves them, and with the channel weights of LPIPS."""

from __future__ import annotations

import numpy as np

from como_jax.errors import RunError
from como_jax.motion.perceptual import LAYOUTS
from como_jax.weights.importing import Foreign, Options, Skip
from como_jax.weights.tables import Entry, Table, array, single
from como_jax.weights.tensors import Weights

_FIRST = "features.0.weight"
_LPIPS_SKIPS = (
    Skip(r"(classifier|avgpool)\..*", "the classifier"),
    Skip(r"scaling_layer\.(shift|scale)", "the normalisation that frames have here already"),
    Skip(r"lins\.\d\.model\.1\.weight|lin\d\.model\.1\.weight", "weights of channels once more"),
)


def lpips(weights: Weights, options: Options) -> Foreign:
    """A network of LPIPS with its channel weights; if the network is torchvision's, they come from a second file."""
    foreign = torchvision(weights, options)
    names = {f"lin{number}.model.1.weight": f"lins.{number}.model.1.weight" for number in range(5)}
    taps = [spec.channels for spec in LAYOUTS[foreign.family] if spec.tap]
    table: Table = {}
    for (first, second), channels in zip(names.items(), taps, strict=True):
        found = first if first in weights.files else second
        if {first, second} <= weights.files.keys():
            _check_equal(weights, first, second)
        table[first] = Entry((found,), (1, channels, 1, 1), np.asarray)
    return Foreign(foreign.family, foreign.config, {**foreign.table, **single(table)}, foreign.skips)


def torchvision(weights: Weights, options: Options) -> Foreign:
    """VGG16 or AlexNet, with the names that torchvision or lpips gives the convolutions."""
    del options
    names = {name: name for name in weights.files if name.startswith("features.")}
    # lpips divides the network into slices and keeps the numbers of the layers.
    for name in weights.files:
        parts = name.removeprefix("net.").split(".")
        if len(parts) == 3 and parts[0].startswith("slice"):
            names[f"features.{parts[1]}.{parts[2]}"] = name
    first = weights.shape(names.get(_FIRST, _FIRST))
    network = next((name for name, layout in LAYOUTS.items() if first[-1] == layout[0].kernel), None)
    if network is None:
        raise RunError(f"{weights.path} is none of {', '.join(LAYOUTS)}: its first kernel is {first}.")
    table: Table = {}
    channels = 3
    for spec in LAYOUTS[network]:
        for end, shape in (("weight", (spec.channels, channels, spec.kernel, spec.kernel)), ("bias", (spec.channels,))):
            name = f"features.{spec.index}.{end}"
            table[name] = array(names.get(name, name), *shape)
        channels = spec.channels
    return Foreign(network, {}, single(table), _LPIPS_SKIPS)


def _check_equal(weights: Weights, first: str, second: str) -> None:
    shape = weights.shape(first)
    if not np.array_equal(weights.take(first, shape), weights.take(second, shape)):
        raise RunError(f"{weights.path} holds two different tensors, {first} and {second}; leave one out.")
