"""The directory of a run: claimed by the run that trains there, opened by whatever comes after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from como_jax import hosts
from como_jax.errors import RunError
from como_jax.files import write_text
from como_jax.motion.models import FAMILIES, build_model
from como_jax.nn.model_def import ModelDef, Params
from como_jax.spec.policies import with_new_names
from como_jax.training import sharding
from como_jax.training.checkpoint import load_newest

LATENT_FAMILIES = tuple(family for family in FAMILIES if family != "mae")


# Fields that may differ when a run is resumed, since they change no number that is computed. `data.num_workers` is not
# among them, because it changes the state of the data iterator. The size of a label follows from other fields.
FREE_FIELDS = (
    "data.num_threads",
    "evaluation.",
    "mesh.",
    "model.label_size",
    "profile",
    "train.attention",
    "train.checkpoint_every",
    "train.collapse_steps",
    "train.evaluate_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.stop_after",
)


class Run(NamedTuple):
    """A trained model: its directory, config and definition, and the parameters of its newest checkpoint."""

    workdir: epath.Path
    config: ConfigDict
    model: ModelDef
    params: Params
    step: int


def load_run(workdir: epath.PathLike, mesh: Mesh) -> Run:
    """The latent-motion model of a run with the parameters of its newest checkpoint, on the devices of `mesh`.

    Raises:
      RunError: no run, one of a family without latent motion, or one whose checkpoint does not fit its config.
    """
    return open_run(workdir, mesh, LATENT_FAMILIES, build_model, "has no latent motion")


def open_run(
    workdir: epath.PathLike,
    mesh: Mesh,
    families: tuple[str, ...],
    build: Callable[[ConfigDict], ModelDef],
    otherwise: str,
) -> Run:
    """Opens a run, with its parameters on the devices of `mesh`.

    Args:
      workdir: the run's directory.
      mesh: the devices.
      families: those that the run may be of.
      build: makes the model of a config.
      otherwise: what the error says of a run of another family, such as "has no latent motion".

    Raises:
      RunError: no run, one of another family, or one whose checkpoint does not fit its config.
    """
    workdir = epath.Path(workdir)
    # A directory that only some hosts can see is an error of all.
    with hosts.in_step():
        config = read_config(workdir)
    family = config.get("family")
    if family not in families:
        raise RunError(
            f"{workdir} is a run of family {family!r}, which {otherwise}; take one of {', '.join(families)}."
        )
    try:
        model = build(config)
    except (AttributeError, KeyError, TypeError) as error:
        raise RunError(f"{workdir}/config.json does not describe a model of this version: {error}") from error
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )
    step, params = load_newest(workdir, abstract)
    return Run(workdir, config, model, params, step)


def read_config(workdir: epath.Path) -> ConfigDict:
    """Reads the config of a run.

    Raises:
      RunError: the directory holds no run, or a damaged one.
    """
    try:
        return ConfigDict(json.loads((workdir / "config.json").read_text(), object_hook=with_new_names))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(f"`workdir` {workdir} holds no run: it has no config.json.") from error
    except (ValueError, TypeError) as error:
        raise RunError(f"{workdir}/config.json is damaged: {error}") from error


def check_workdir(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Raises RunError if the run directory cannot be made, or holds a run of another config."""
    workdir = epath.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        before = (workdir / "config.json").read_text()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"`workdir` {workdir} cannot be written: {error}") from error
    changes = _differences(json.loads(before, object_hook=with_new_names), json.loads(_config_text(config)))
    if changes:
        raise RunError(
            f"{workdir} holds a run of another config; choose a new `workdir`, or resume with equal fields. "
            f"Different: {'; '.join(changes)}."
        )


def claim_workdir(workdir: epath.PathLike, config: ConfigDict) -> None:
    """Makes the directory one of a run of this config, unless it is.

    Raises:
      RunError: the directory cannot be written, or belongs to another config.
    """
    check_workdir(workdir, config)
    path = epath.Path(workdir) / "config.json"
    if path.exists():
        return
    try:
        write_text(path, _config_text(config))
    except OSError as error:
        raise RunError(f"`workdir` {workdir} cannot be written: {error}") from error


def _config_text(config: ConfigDict) -> str:
    return config.to_json_best_effort(indent=2, sort_keys=True)


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    changes = []
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            changes += _differences(before, now, f"{name}.")
        elif before != now and not name.startswith(FREE_FIELDS):
            changes.append(f"config.{name} was {before!r} and is {now!r}")
    return changes
