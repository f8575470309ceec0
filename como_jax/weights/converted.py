"""Weights of networks that are read from safetensors files as they are: text towers and networks of perceptual losses.

Their import is a file that holds what the network needs, under the names that its reader knows.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from como_jax.errors import OutputError, RunError
from como_jax.files import write_atomic, write_json
from como_jax.motion.perceptual import LAYOUTS, load_perceptual
from como_jax.spec.towers import TextConfig
from como_jax.weights.checkpoints import Weights
from como_jax.weights.importing import Flat, Foreign, Options, Skip
from como_jax.weights.runs import REPORT_NAME, check_free
from como_jax.weights.tables import CONFIG_NAME, Entry, Table, array
from como_jax.weights.text import load_text_tower, text_config_of
from como_jax.weights.text_tables import T5_TOKENS, clip_table, t5_table
from como_jax.weights.vit_tables import single

WEIGHTS_NAME = "model.safetensors"
_FIRST = "features.0.weight"
_CLIP_SKIPS = (
    Skip(r"vision_model\..*|visual_projection\.weight", "the image tower"),
    Skip(r"text_projection\.weight|logit_scale", "what compares text with images"),
    Skip(r".*embeddings\.position_ids", "the numbers from 0 on"),
)
_T5_SKIPS = (
    Skip(r"decoder\..*|lm_head\.weight", "the decoder"),
    Skip("|".join(name.replace(".", r"\.") for name in T5_TOKENS), "the table of tokens once more"),
)
_LPIPS_SKIPS = (
    Skip(r"(classifier|avgpool)\..*", "the classifier"),
    Skip(r"scaling_layer\.(shift|scale)", "the normalisation that frames have here already"),
    Skip(r"lins\.\d\.model\.1\.weight|lin\d\.model\.1\.weight", "weights of channels once more"),
)


def clip_text(weights: Weights, options: Options) -> Foreign:
    """The text tower of CLIPModel and CLIPTextModel."""
    del options
    config = text_config_of(weights.path, TextConfig(tower="clip"))
    prefix = "text_model." if any(name.startswith("text_model.") for name in weights.files) else ""
    return _as_it_is("clip", clip_table(config, prefix), config.depth, _CLIP_SKIPS)


def t5_encoder(weights: Weights, options: Options) -> Foreign:
    """The encoder of T5ForConditionalGeneration and T5EncoderModel."""
    del options
    config = text_config_of(weights.path, TextConfig(tower="t5"))
    tokens = next((name for name in T5_TOKENS if name in weights.files), T5_TOKENS[0])
    return _as_it_is("t5", t5_table(config, tokens), config.depth, _T5_SKIPS)


def lpips(weights: Weights, options: Options) -> Foreign:
    """A network of lpips with its weights of channels; those of torchvision's files are in a file of their own."""
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
    """VGG16 or AlexNet as torchvision, or lpips, names its convolutions."""
    del options
    names = {name: name for name in weights.files if name.startswith("features.")}
    # In lpips a slice keeps torchvision's numbers.
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


def write_converted(out: epath.PathLike, foreign: Foreign, tensors: Flat, path: epath.Path, report: Any) -> str:
    """Writes the file, the config.json that belongs to it and the report, all or nothing; returns how it is used.

    Args:
      out: directory to be made.
      foreign: what the file is.
      tensors: by their names in the file.
      path: of the original, with config.json beside it where there has to be one.
      report: of where the weights are from.

    Raises:
      OutputError: there is something already, or nothing can be written there.
    """
    out = epath.Path(out)
    check_free(out)
    partial = out.with_name(f".{out.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        content = safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
        write_atomic(partial / WEIGHTS_NAME, lambda file: file.write(content))
        write_json(partial / REPORT_NAME, report)
        if foreign.family in LAYOUTS:
            load_perceptual(partial / WEIGHTS_NAME, foreign.family)
            section, kind, file = "model", "perceptual_space", "perceptual_file"
        else:
            write_json(partial / CONFIG_NAME, _settings(path))
            load_text_tower(partial / WEIGHTS_NAME)
            section, kind, file = "text", "tower", "weights"
        partial.rename(out)
    except OSError as error:
        raise OutputError(f"--out {out} cannot be written: {error}") from error
    finally:
        if partial.exists():
            partial.rmtree()
    return f"--config.{section}.{kind}={foreign.family} --config.{section}.{file}={out / WEIGHTS_NAME}"


def _settings(path: epath.Path) -> Mapping[str, Any]:
    return json.loads((path.parent / CONFIG_NAME).read_text())


def _as_it_is(family: str, table: Table, depth: int, skips: tuple[Skip, ...]) -> Foreign:
    """Every tensor of a table under its own name."""
    tensors: Table = {}
    for entry in table.values():
        for name in (name.format(layer=layer) for layer in range(depth) for name in entry.names):
            tensors[name] = array(name, *entry.shape)
    return Foreign(family, {}, single(tensors), skips)


def _check_equal(weights: Weights, first: str, second: str) -> None:
    shape = weights.shape(first)
    if not np.array_equal(weights.take(first, shape), weights.take(second, shape)):
        raise RunError(f"{weights.path} holds two different tensors, {first} and {second}; leave one out.")
