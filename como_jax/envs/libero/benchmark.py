"""What LIBERO's package and its meshes hold (arXiv 2306.03310)."""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import pickletools
import re
import shutil
import tempfile
import zipfile
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from como_jax.envs.libero.arm import Task, import_robosuite
from como_jax.errors import ConfigError, closest
from como_jax.files import write_json

# Tasks of each suite, and the steps that public evaluations grant, a little more than the longest demonstration
# (OpenVLA, arXiv 2406.09246, experiments/robot/libero/run_libero_eval.py).
SUITES = {
    "libero_spatial": (10, 220),
    "libero_object": (10, 280),
    "libero_goal": (10, 300),
    "libero_10": (10, 520),
    "libero_90": (90, 400),
}
TASKS = tuple(f"{suite}/{number}" for suite, (count, _) in SUITES.items() for number in range(count))
_INSTRUCTIONS = ("problem", "name")
INSTALL = "pip install 'como_jax[libero]' && pip install --no-deps 'hf-libero==0.1.4'"
_CONFIG_VARIABLE = "LIBERO_CONFIG_PATH"
# LIBERO looks here too, after its own package.
_MESH_CACHE = "~/.cache/libero/assets"
_MESH_FOLDERS = ("articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "turbosquid_objects")
# What the pickle of an array calls, up to the version of NumPy.
_ARRAY_PICKLE = ["numpy.core.multiarray _reconstruct", "numpy ndarray", "_codecs encode", "numpy dtype"]


def load(task: str, instruction: str = "problem") -> Task:
    """One of `TASKS`.

    Args:
      task: its suite and number, counted from 0 in the benchmark's own order.
      instruction: whose sentence it has, `problem` or `name`.

    Raises:
      ConfigError: LIBERO or its meshes are missing, or an unknown `instruction`.
    """
    if instruction not in _INSTRUCTIONS:
        raise ConfigError(
            f"setting instruction={instruction}: must be {' or '.join(_INSTRUCTIONS)}"
            f"{closest(instruction, _INSTRUCTIONS)}"
        )
    suite, _, number = task.partition("/")
    libero = import_libero()
    import_robosuite()
    name = task_names()[suite][int(number)]
    problem = _folder(libero, "bddl_files") / suite / f"{name}.bddl"
    sentence = problem_instruction(problem) if instruction == "problem" else named_instruction(name)
    states = read_init_states(_folder(libero, "init_states") / suite / f"{name}.pruned_init")
    _use_meshes(libero)
    return Task(f"libero:{task}", sentence, SUITES[suite][1], functools.partial(_build, problem), states)


def import_libero() -> ModuleType:
    """The package `libero.libero`, whose import would ask where to put data if it found no config file.

    The file is `config.yaml` in the folder that the environment variable LIBERO_CONFIG_PATH names, or in ~/.libero.
    If it is missing it is written: into the folder that the variable names, or else into a temporary one that the
    variable then names for this process and its children, so that nothing is left in anybody's home.

    Raises:
      ConfigError: LIBERO is not installed.
    """
    root = _package_folder()
    folder = epath.Path(os.environ.get(_CONFIG_VARIABLE, "~/.libero")).expanduser()
    if not (folder / "config.yaml").exists():
        if _CONFIG_VARIABLE not in os.environ:
            folder = epath.Path(tempfile.mkdtemp(prefix="libero-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            os.environ[_CONFIG_VARIABLE] = str(folder)
        folder.mkdir(parents=True, exist_ok=True)
        places = {"bddl_files": root / "bddl_files", "init_states": root / "init_files", "assets": root / "assets"}
        places |= {"benchmark_root": root, "datasets": root.parent / "datasets"}
        # JSON is YAML too.
        write_json(folder / "config.yaml", {key: str(path) for key, path in places.items()})
    try:
        return importlib.import_module("libero.libero")
    except ImportError as error:
        raise _missing(error) from error


def task_names() -> dict[str, list[str]]:
    """Names of the tasks of each suite, in the benchmark's order.

    Raises:
      ConfigError: LIBERO is not installed.
    """
    # By its path, since its package imports PyTorch, which nothing here needs.
    path = _package_folder() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.libero_task_map


def named_instruction(name: str) -> str:
    """The instruction in a name such as `KITCHEN_SCENE10_close_the_top_drawer`."""
    return re.sub(r"^[A-Z_]*SCENE\d+_", "", name).replace("_", " ")


def problem_instruction(path: epath.Path) -> str:
    """The instruction in a problem file (BDDL), in lower case as LIBERO reads it."""
    found = re.search(r"\(:language\s+([^()]*)\)", path.read_text())
    if not found:
        raise ConfigError(f"{path} has no line (:language ...); install LIBERO anew: {INSTALL}")
    return " ".join(found[1].lower().split())


def read_init_states(path: epath.Path) -> np.ndarray:
    """The states that a task may start from, float64 `[N, S]`, as `torch.save` wrote them.

    Their array is a pickle, of which nothing is executed: its shape and bytes are taken from the list of its steps.

    Raises:
      ConfigError: the file is missing or holds anything else.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            steps = [(step.name, value) for step, value, _ in pickletools.genops(archive.read(member))]
        names = [name for name, _ in steps if "PUT" not in name]
        called = [value.replace("._core.", ".core.") for name, value in steps if name == "GLOBAL"]
        texts = [value for name, value in steps if name == "BINUNICODE"]
        numbers = [value for name, value in steps if name.startswith("BININT")]
        if called != _ARRAY_PICKLE or texts[2:4] != ["f8", "<"] or names[-1] != "STOP":
            raise ValueError("not an array of float64")
        # The first two numbers are the length of the empty array that is filled and the version of the format.
        rows, columns = numbers[2:4]
        return np.frombuffer(texts[4].encode("latin1"), "<f8").reshape(rows, columns)
    except (OSError, ValueError, IndexError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} holds no initial states ({error}); install LIBERO anew: {INSTALL}") from error


def _build(problem: epath.Path, **arguments: Any) -> Any:
    """Robosuite's environment for a problem file, with the arguments that LIBERO itself gives."""
    try:
        scenes = importlib.import_module("libero.libero.envs")
        parser = importlib.import_module("libero.libero.envs.bddl_utils")
    except ImportError as error:
        raise _missing(error) from error
    domain = scenes.TASK_MAPPING[parser.get_problem_info(str(problem))["problem_name"]]
    return domain(str(problem), gripper_types="default", initialization_noise=None, **arguments)


def _package_folder() -> epath.Path:
    """Where `libero.libero` lies, found without importing it."""
    try:
        importlib.metadata.version("robosuite")
        spec = importlib.util.find_spec("libero.libero")
    except ImportError as error:
        raise _missing(error) from error
    if spec is None:
        raise _missing(ImportError("No module named 'libero.libero'"))
    return epath.Path(spec.origin).parent


def _folder(libero: ModuleType, key: str) -> epath.Path:
    """A folder that LIBERO's config file names."""
    try:
        return epath.Path(libero.get_libero_path(key))
    except (AssertionError, OSError) as error:
        raise ConfigError(f"{libero.config_file} names no {key}; delete the file to have it written anew.") from error


def _use_meshes(libero: ModuleType) -> None:
    """Points LIBERO at its meshes, which it would download otherwise.

    Raises:
      ConfigError: there are none; the message says where to get them and where to put them.
    """
    folders = [_folder(libero, "assets"), _package_folder() / "assets", epath.Path(_MESH_CACHE).expanduser()]
    for folder in folders:
        if all((folder / name).is_dir() for name in _MESH_FOLDERS):
            libero._assets_path_cache = str(folder)
            return
    raise ConfigError(
        f"LIBERO's meshes are neither in {folders[0]} nor in {folders[-1]}; download them with: hf download "
        f"lerobot/libero-assets --repo-type dataset --local-dir {_MESH_CACHE}, or name their folder as `assets` in "
        f"{libero.config_file}"
    )


def _missing(error: ImportError) -> ConfigError:
    return ConfigError(f"LIBERO cannot be imported ({error}); install it with: {INSTALL}")
