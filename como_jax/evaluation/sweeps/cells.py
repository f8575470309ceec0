"""The cells of a sweep: one run for every recipe, value of every swept field, and seed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from como_jax.cli import unknown_field
from como_jax.errors import ConfigError
from como_jax.processes import run_commands

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
      recipe: PATH or PATH:VARIANT of its config file.
      swept: value of every swept field, as given.
      seed: of the run.
      overrides: FIELD=VALUE for every field in which the config differs from the recipe.
      config: the recipe with the overrides.
      workdir: of the run.
    """

    recipe: str
    swept: Mapping[str, str]
    seed: int
    overrides: tuple[str, ...]
    config: ConfigDict
    workdir: epath.Path

    @property
    def label(self) -> str:
        """The recipe as tables name it: `pretrain_como:tiny`."""
        path, colon, variant = self.recipe.partition(":")
        return f"{Path(path).stem}{colon}{variant}"

    @property
    def latent_size(self) -> int | None:
        """Numbers of a latent, over all its tokens; None for a model without `latent_dim`."""
        model = self.config.model
        return model.latent_dim * model.get("num_queries", 1) if "latent_dim" in model else None


def make_cells(
    out: epath.PathLike,
    recipes: Sequence[str],
    swept: Mapping[str, Sequence[str]],
    fixed: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
) -> list[Cell]:
    """The cells of all combinations; settings are in the order given, the seeds of a setting next to each other.

    Args:
      out: directory of the sweep; a run lies in OUT/SETTING/seedN.
      recipes: PATH or PATH:VARIANT of config files.
      swept: values of every swept field of the config.
      fixed: FIELD=VALUE for all cells whose recipe has the field.
      seeds: values of the field `seed`.

    Raises:
      ConfigError: a recipe, field or value is wrong, or two cells are the same.
    """
    fields = [*swept, "seed", *(text.partition("=")[0] for text in fixed)]
    for field in fields:
        if fields.count(field) > 1:
            raise ConfigError(f"{field} is set twice, as a swept field, a fixed one or the seed; set it once.")
    fixed_of = _share_fixed(recipes, fixed)
    cells: dict[epath.Path, Cell] = {}
    for recipe, values, seed in itertools.product(recipes, itertools.product(*swept.values()), seeds):
        setting = dict(zip(swept, values, strict=True))
        overrides = (*fixed_of[recipe], *(f"{field}={value}" for field, value in setting.items()), f"seed={seed}")
        config = load_recipe(recipe, overrides)
        cell = Cell(recipe, setting, seed, overrides, config, epath.Path(out))
        name = _file_name("_".join([cell.label, *(f"{field}={value}" for field, value in setting.items())]))
        cell = dataclasses.replace(cell, workdir=cell.workdir / name / f"seed{seed}")
        if cell.workdir in cells:
            raise ConfigError(f"Two cells would share {cell.workdir}; give every recipe, value and seed once.")
        cells[cell.workdir] = cell
    return list(cells.values())


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config of a recipe with overrides FIELD=VALUE, as the commands read them from their flags.

    Raises:
      ConfigError: no such file, variant or field, or a value of another type.
    """
    config = _parse(recipe)
    for text in overrides:
        message = unknown_field(config, text.partition("=")[0])
        if message:
            raise ConfigError(f"{recipe}: {message}")
    return _parse(recipe, overrides)


def expand_recipes(recipes: Sequence[str], variants: Sequence[str]) -> list[str]:
    """Every recipe without a variant with each of `variants`; ["all"] means those of the file's tuple `VARIANTS`."""
    found = []
    for recipe in recipes:
        if ":" in recipe or not variants:
            found.append(recipe)
        else:
            names = _variants_of(recipe) if list(variants) == ["all"] else variants
            found += [f"{recipe}:{name}" for name in names]
    return found


def parse_swept(texts: Sequence[str]) -> dict[str, list[str]]:
    """The values of each field, from texts FIELD=V1,V2; values that contain commas are separated by semicolons.

    Raises:
      ConfigError: no field, no value, or a field twice.
    """
    swept: dict[str, list[str]] = {}
    for text in texts:
        field, _, values = text.partition("=")
        if not field or not values:
            raise ConfigError(f"swept field {text!r} is not FIELD=VALUE,VALUE.")
        if field in swept:
            raise ConfigError(f"{field} is swept twice; give all its values at once.")
        swept[field] = values.split(";" if ";" in values else ",")
    return swept


def run_in_processes(
    module: str, cells: Sequence[Cell], count: int, arguments: Sequence[str] = ()
) -> Iterator[tuple[Cell, str]]:
    """Runs the command `python -m MODULE` for every cell, `count` at once, with further arguments.

    Yields:
      Every cell as it ends, with the reason why it failed, or "".
    """
    commands = [
        [sys.executable, "-m", module, f"--config={cell.recipe}", f"--workdir={cell.workdir}"]
        # Within an allocation of several processes, each cell still is a run of its own.
        + ["--num_processes=1", *arguments, *(f"--config.{override}" for override in cell.overrides)]
        for cell in cells
    ]
    logs = [Path(cell.workdir.parent) / f"{cell.workdir.name}.log" for cell in cells]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(jax.config.jax_persistent_cache_min_compile_time_secs),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # For runs that share a GPU.
        **os.environ,
    }
    logger.info("Every run prints to RUN.log beside its directory.")
    with contextlib.closing(run_commands(commands, logs, count, environment)) as ended:
        for number, status in ended:
            yield cells[number], f"exit status {status}: {_last_error(logs[number])}" if status else ""


def _share_fixed(recipes: Sequence[str], fixed: Sequence[str]) -> dict[str, list[str]]:
    """The overrides of each recipe, of the fields that it has; a field that no recipe has is an error."""
    configs = {recipe: _parse(recipe) for recipe in recipes}
    shared: dict[str, list[str]] = {recipe: [] for recipe in recipes}
    for text in fixed:
        having = [recipe for recipe in shared if not unknown_field(configs[recipe], text.partition("=")[0])]
        for recipe in having or recipes[:1]:
            load_recipe(recipe, [text])
            shared[recipe].append(text)
        if len(having) < len(shared):
            others = ", ".join(recipe for recipe in shared if recipe not in having)
            logger.warning("%s is left out of recipes without such a field: %s", text, others)
    return shared


def _parse(recipe: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The locked config of a recipe, by the flags of the commands."""
    _check_file(recipe.partition(":")[0])
    arguments = ["recipe", f"--config={recipe}", *(f"--config.{text}" for text in overrides)]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{recipe}: {_last_line(str(error))}") from error
    return config.value


def _last_line(text: str) -> str:
    """The message of an error, without the traceback that errors inside a config file come with."""
    line = text.strip().splitlines()[-1]
    return line.partition(": ")[2] if "Traceback" in text else line


def _variants_of(path: str) -> Sequence[str]:
    _check_file(path)
    spec = importlib.util.spec_from_file_location("recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "VARIANTS"):
        raise ConfigError(f"{path} has no tuple VARIANTS; name its variants.")
    return module.VARIANTS


def _check_file(path: str) -> None:
    if not (path.endswith(".py") and Path(path).is_file()):
        raise ConfigError(f"{path}: there is no such Python file.")


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", text)


def _last_error(log: Path) -> str:
    """The error that a command reported, or the last line that it printed, and its log."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return f"{[*lines, *errors][-1]} (see {log})"
