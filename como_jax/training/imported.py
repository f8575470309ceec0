"""Imports the weights of other projects: as the directory of a run, or as a safetensors file that a config names.

Every format is a function of `como_jax.weights`. A run holds config.json, a checkpoint of step 0 and a report of where
its parameters come from, so that everything that takes the directory of a run can start from it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from etils import epath
from flax import nnx, traverse_util
from ml_collections import ConfigDict

from como_jax.errors import OutputError, RunError
from como_jax.files import write_atomic, write_json
from como_jax.motion.models import FAMILIES, build_model
from como_jax.motion.perceptual import LAYOUTS, load_perceptual
from como_jax.nn.vit import Siglip, Vit, vit_config
from como_jax.spec.towers import VitConfig
from como_jax.staging import check_output, new_folder
from como_jax.training.checkpoint import load_params
from como_jax.training.run import claim_workdir, read_config
from como_jax.weights import laq_openx, moto, perceptual, text, vit_encoders
from como_jax.weights.importing import Accounts, Flat, Foreign, Format, Options, import_parameters
from como_jax.weights.tensors import CONFIG_NAME, WEIGHTS_NAME, Weights, read_json, read_weights

RUNS: dict[str, Format] = {
    "mae-facebook": vit_encoders.mae_facebook,
    "mae-huggingface": vit_encoders.mae_huggingface,
    "timm-vit": vit_encoders.timm_vit,
    "siglip": vit_encoders.siglip,
    "laq": laq_openx.laq_openx,
    "moto": moto.moto,
    "como": moto.como,
}
"""Formats that become the directory of a run."""

FILES: dict[str, Format] = {
    "lpips": perceptual.lpips,
    "torchvision": perceptual.torchvision,
    "clip-text": text.clip_text,
    "t5-encoder": text.t5_encoder,
}
"""Formats that become a safetensors file."""

REPORT_NAME = "import_report.json"
_ENCODER_FIELDS = ("patch_size", "width", "depth", "num_heads", "mlp_width")
Recipe = Callable[[str], ConfigDict]
"""Returns the config that trains a family of motion models."""


class Imported(NamedTuple):
    """The account of all tensors, and the family of the model, or the part of a model, that was imported."""

    accounts: Accounts
    family: str


def import_weights(
    format_name: str, sources: Sequence[epath.PathLike], out: epath.PathLike, options: Options, recipe: Recipe
) -> Imported:
    """Reads weights and writes a run or a safetensors file.

    Args:
      format_name: a key of `RUNS` or `FILES`.
      sources: files or folders whose tensors belong together.
      out: the directory to be made; it appears when it is complete.
      options: what the files do not say; `settings` are read from config.json beside the first file.
      recipe: gives the config that the run of a motion model begins with.

    Raises:
      UsageError: a file cannot be read or is not of this format, or `out` cannot be made.
    """
    check_output(epath.Path(out), None)
    weights = functools.reduce(Weights.merged, [read_weights(source) for source in sources])
    beside = weights.path.parent / CONFIG_NAME
    options = dataclasses.replace(options, settings=read_json(beside) if beside.is_file() else {})
    foreign = (RUNS | FILES)[format_name](weights, options)
    params, accounts = import_parameters(weights, foreign)
    report = {
        "format": format_name,
        "files": [
            {"name": path.name, "bytes": path.stat().length, "sha256": _sha256(path)} for path in weights.read_from
        ],
        "config": dict(foreign.config),
        **dataclasses.asdict(accounts),
    }
    try:
        with new_folder(out) as folder:
            write_json(folder / REPORT_NAME, report)
            if format_name in FILES:
                _write_file(folder, foreign.family, params, weights.path)
            else:
                _write_run(folder, make_config(foreign, recipe), params)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}") from error
    return Imported(accounts, foreign.family)


def make_config(foreign: Foreign, recipe: Recipe) -> ConfigDict:
    """The config of an imported run: the recipe of its family with the sizes of the file, or the config of a part."""
    if foreign.family in FAMILIES:
        config = recipe(foreign.family)
        # The data of the recipe is not what these weights were trained on, so nothing may be compared with it.
        config.data.mixture = "data_of_the_imported_weights"
    else:
        config = ConfigDict({"family": foreign.family, "data": {}, "encoder": {}})
    with config.unlocked():
        for name, value in foreign.config.items():
            section, _, field = name.rpartition(".")
            (config[section] if section else config)[field] = value
    return config


def check_parameters(config: ConfigDict, params: Flat) -> None:
    """Raises RunError unless the parameters are exactly those of the config's model."""
    wanted = _shapes(config)
    found = {path: value.shape for path, value in params.items()}
    for path in sorted(wanted.keys() | found.keys()):
        if wanted.get(path) != found.get(path):
            raise RunError(
                f"The imported model does not fit its config: {path} is {found.get(path)} and must be "
                f"{wanted.get(path)}; are `image_size` and `num_heads` right?"
            )


def read_encoder(workdir: epath.PathLike) -> tuple[Flat, dict[str, Any]]:
    """The encoder of a run: its parameters by their paths, and its config fields by full name.

    Raises:
      RunError: there is no run, or it has no encoder.
    """
    config = read_config(epath.Path(workdir))
    try:
        shapes = _module_shapes(Vit, vit_config(config))
    except (AttributeError, KeyError) as error:
        raise RunError(f"{workdir} is a run without an encoder: {error}") from error
    params = load_params(workdir, {"encoder": shapes})
    fields = {"data.image_size": config.data.image_size}
    fields |= {f"encoder.{name}": config.encoder[name] for name in _ENCODER_FIELDS if name in config.encoder}
    return {path: np.asarray(value) for path, value in traverse_util.flatten_dict(params, sep="/").items()}, fields


def _write_file(folder: epath.Path, family: str, tensors: Flat, source: epath.Path) -> None:
    """Writes a safetensors file and, for a text tower, its config.json."""
    content = safetensors.numpy.save({name: np.ascontiguousarray(value) for name, value in tensors.items()})
    write_atomic(folder / WEIGHTS_NAME, lambda file: file.write(content))
    # Reading the file again shows that its reader understands it.
    if family in LAYOUTS:
        load_perceptual(folder / WEIGHTS_NAME, family)
    else:
        write_json(folder / CONFIG_NAME, read_json(source.parent / CONFIG_NAME))
        text.load_text_tower(folder / WEIGHTS_NAME)


def _write_run(folder: epath.Path, config: ConfigDict, params: Flat) -> None:
    """Writes the config and a checkpoint, which has no position in the data, so no run can go on from it."""
    check_parameters(config, params)
    claim_workdir(folder, config)
    nested = traverse_util.unflatten_dict({path: jnp.asarray(value) for path, value in params.items()}, sep="/")
    state = {"step": jnp.zeros((), jnp.int32), "params": nested, "frozen": {}, "opt_state": {}, "ema": None}
    options = ocp.CheckpointManagerOptions(create=True)
    with ocp.CheckpointManager(folder / "checkpoints", options=options) as manager:
        manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
        manager.wait_until_finished()


def _sha256(path: epath.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters of the config's model, or of the part of a model that it describes."""
    if config.family in FAMILIES:
        shapes = jax.eval_shape(build_model(config).init, jax.random.key(0))
        return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items()}
    is_encoder = config.family == "encoder"
    tower, prefix = (Vit if is_encoder else Siglip), ("encoder" if is_encoder else "observation/images")
    flat = traverse_util.flatten_dict(_module_shapes(tower, vit_config(config)), sep="/")
    return {f"{prefix}/{path}": leaf.shape for path, leaf in flat.items()}


def _module_shapes(tower: Callable[..., nnx.Module], config: VitConfig) -> dict[str, Any]:
    """Nested shapes of a tower's parameters."""
    module = nnx.eval_shape(lambda: tower(config, rngs=nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.split(module)[1])
