"""The directory of a run: claimed by the run that trains there, opened by whatever comes after it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import flags
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from como_jax import hosts
from como_jax.errors import RunError
from como_jax.files import write_text
from como_jax.motion.models import FAMILIES, build_model
from como_jax.nn.model_def import ModelDef, Params
from como_jax.spec.exported import FORMAT as EXPORT_FORMAT
from como_jax.spec.interface import POLICY_FILE
from como_jax.spec.policies import with_new_names
from como_jax.training import sharding
from como_jax.training.checkpoint import load_newest
from como_jax.training.run_data import DATA_FILE

LATENT_FAMILIES = tuple(family for family in FAMILIES if family != "mae")

CONFIG_FILE = "config.json"

# What a run writes, beside its config.
RUN_FILES = ("checkpoints", "metrics.jsonl", "tensorboard", "images", DATA_FILE, POLICY_FILE)

# Fields that may differ when a run is resumed, since they change no number that is computed. `data.num_workers` is not
# among them, because it changes the state of the data iterator. The size of a label follows from other fields.
FREE_FIELDS = (
    "data.frame_cache_gib",
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

# The flags that this module defines are those of the command that calls it.
flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What a run may be resumed with, although it is not what it began with.

    Attributes:
      other_data: other datasets, or other content of the same; the scales stay those of the first start.
      lengthen: a larger `train.num_steps`, and learning rates for it.
    """

    other_data: bool = False
    lengthen: bool = False

    @property
    def arguments(self) -> list[str]:
        """The flags of a command that allow the same."""
        return [f"--{name}" for name, is_allowed in vars(self).items() if is_allowed]

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the config that may differ."""
        longer = ("train.num_steps", "optim.learning_rate", "optim.final_learning_rate")
        return (*(("data.mixture",) if self.other_data else ()), *(longer if self.lengthen else ()))


NOTHING_ELSE = Allowed()


def define_resume_flags() -> None:
    """Defines the flags of `allowed_by_flags`."""
    flags.DEFINE_bool("other_data", False, "Resume with other data than those of the first start; keep its scales.")
    flags.DEFINE_bool("lengthen", False, "Resume with a larger train.num_steps; its learning rates may differ too.")


def allowed_by_flags() -> Allowed:
    """What the flags of a command allow."""
    return Allowed(flags.FLAGS.other_data, flags.FLAGS.lengthen)


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
        content = json.loads((workdir / "config.json").read_text(), object_hook=with_new_names)
        config = ConfigDict(content)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(f"`workdir` {workdir} holds no run: it has no config.json.") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{workdir}/config.json is damaged: {error}") from error
    if config.get("format") == EXPORT_FORMAT:
        raise RunError(
            f"`workdir` {workdir} is an export for PyTorch, not a run; name the run that it was made of. Exports are "
            "for `python -m tools.serve --model` and como_jax.runtime_torch."
        )
    return config


def check_workdir(workdir: epath.PathLike, config: ConfigDict, allowed: Allowed = NOTHING_ELSE) -> None:
    """Checks that a run of this config can begin or go on in a directory.

    Raises:
      RunError: the directory cannot be made, or holds a run of another config or files of another origin.
    """
    workdir = epath.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        is_run = (workdir / CONFIG_FILE).exists()
        others = [] if is_run else [name for name in RUN_FILES if _holds_data(workdir / name)]
    except OSError as error:
        raise RunError(f"`workdir` {workdir} cannot be written: {error}") from error
    if others:
        raise RunError(
            f"{workdir} holds {', '.join(others)} but no {CONFIG_FILE}, so this is not a run of this project, and "
            "nothing there is replaced; choose another `workdir`."
        )
    if not is_run:
        return
    before, now = read_config(workdir).to_dict(), json.loads(_config_text(config))
    if "family" not in before:
        raise RunError(f"{workdir}/{CONFIG_FILE} is not of a run of this project; choose another `workdir`.")
    changes = _differences(before, now, (*FREE_FIELDS, *allowed.fields))
    if changes:
        raise RunError(
            f"{workdir} holds a run of another config; choose a new `workdir`, or resume with equal fields. "
            f"Different: {'; '.join(changes)}.{_remedy(changes)}"
        )
    if allowed.lengthen and now["train"]["num_steps"] < before["train"]["num_steps"]:
        raise RunError(
            f"`lengthen` takes a larger config.train.num_steps than {before['train']['num_steps']}, not "
            f"{now['train']['num_steps']}."
        )


def _remedy(changes: list[str]) -> str:
    """The flag that allows the differences of a config, if there is one."""
    for name in ("lengthen", "other_data"):
        fields = tuple(f"config.{field} " for field in Allowed(**{name: True}).fields)
        if all(change.startswith(fields) for change in changes):
            return f" `{name}` resumes the run with them."
    return ""


def _holds_data(path: epath.Path) -> bool:
    """Whether a file exists, or a folder with anything in it."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def claim_workdir(workdir: epath.PathLike, config: ConfigDict, allowed: Allowed = NOTHING_ELSE) -> None:
    """Makes the directory one of a run of this config, unless it is.

    Where fields differ that are allowed to, the config becomes that of the run, and the one before it is kept.

    Raises:
      RunError: the directory cannot be written, or belongs to another config.
    """
    check_workdir(workdir, config, allowed)
    path = epath.Path(workdir) / CONFIG_FILE
    try:
        if path.exists():
            before = read_config(path.parent).to_dict()
            if not _differences(before, json.loads(_config_text(config)), FREE_FIELDS):
                return
            path.copy(_unused(path))
        write_text(path, _config_text(config))
    except OSError as error:
        raise RunError(f"`workdir` {workdir} cannot be written: {error}") from error


def _unused(path: epath.Path) -> epath.Path:
    """A name for an older version of a file."""
    number = 1
    while (found := path.with_name(f"{path.stem}_before_{number}{path.suffix}")).exists():
        number += 1
    return found


def _config_text(config: ConfigDict) -> str:
    return config.to_json_best_effort(indent=2, sort_keys=True)


def _differences(old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...], prefix: str = "") -> list[str]:
    """What differs between two configs, but for fields whose names begin with those of `free`."""
    changes = []
    for key in sorted({*old, *new}):
        name = f"{prefix}{key}"
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            changes += _differences(before, now, free, f"{name}.")
        elif before != now and not name.startswith(free):
            changes.append(f"config.{name} was {before!r} and is {now!r}")
    return changes
