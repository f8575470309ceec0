"""setup.py asks for every package that the library imports, and for optional ones where they are named as extras."""

from __future__ import annotations

import ast
import importlib.metadata as metadata
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
# The extras that each room needs besides what everything needs; a longer path comes first.
EXTRAS = {
    "convert/metaworld": ("metaworld",),
    "convert/procgen/generate.py": ("procgen",),
    "envs/libero": ("libero",),
    "envs/metaworld": ("metaworld",),
    "export/pytorch": ("torch", "onnx"),
    "runtime_torch": ("torch", "transformers"),
    "serving": ("serve", "torch"),
}


@pytest.fixture(scope="module")
def arguments() -> dict[str, Any]:
    """What setup.py passes to setuptools."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **given: found.update(given))
        runpy.run_path(str(REPOSITORY / "setup.py"))
    return found


def names(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported(path: Path) -> set[str]:
    """Packages that a file imports as it is loaded, without those of Python."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"como_jax"}


def test_every_import_of_the_library_is_required(arguments: dict[str, Any]) -> None:
    distributions = metadata.packages_distributions()
    for path in (REPOSITORY / "como_jax").rglob("*.py"):
        room = path.relative_to(REPOSITORY / "como_jax").as_posix()
        extras = next((extras for prefix, extras in EXTRAS.items() if room.startswith(prefix)), ())
        required = names(arguments["install_requires"])
        for extra in extras:
            required |= names(arguments["extras_require"].get(extra, [])) | {extra}
        for package in imported(path):
            if candidates := distributions.get(package):
                assert required & {canonicalize_name(name) for name in candidates}, f"{room} imports {package}"


def test_training_is_installed_by_default_and_robots_and_servers_have_files_of_their_own(
    arguments: dict[str, Any],
) -> None:
    required, extras = names(arguments["install_requires"]), arguments["extras_require"]
    promised = {"jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "ml-collections", "chex"}
    assert required >= promised | {"absl-py"} and "torch" not in required and "train" not in extras
    for room, extra in (("runtime_torch", "torch"), ("serving", "serve")):
        lines = (REPOSITORY / "como_jax" / room / "requirements.txt").read_text().splitlines()
        listed = names([line for line in lines if not line.startswith("#")])
        assert listed <= required | names(extras[extra]) and names(extras[extra]) <= listed
