"""The runtime installs and works where there is no JAX, with what its requirements.txt lists and nothing else."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
# The first one that makes wheels by itself.
pytest.importorskip("setuptools", minversion="70.1")

from packaging.requirements import Requirement  # noqa: E402

from como_jax.runtime_torch.latent_motion import LatentMotion  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIREMENTS = REPOSITORY / "como_jax" / "runtime_torch" / "requirements.txt"
SCRIPT = """
import importlib.util, sys
import numpy as np
from como_jax.runtime_torch.latent_motion import LatentMotion
motion = LatentMotion.from_pretrained(sys.argv[1]).encode(np.load(sys.argv[2]))
np.save(sys.argv[3], motion.latent.numpy())
found = [name for name in ("jax", "jaxlib", "flax", "chex", "etils", "absl") if importlib.util.find_spec(name)]
parts = {name.split(".")[1] for name in sys.modules if name.startswith("como_jax.")}
assert not found and parts <= {"errors", "runtime_torch", "spec"}, (found, parts)
import como_jax, importlib.metadata
print(como_jax.__file__, *importlib.metadata.requires("como_jax"), sep="\\n")
"""


def needed_packages() -> dict[str, Path]:
    """Files and folders of all packages that are needed, and of those that these need, by their names."""
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    # setuptools is there to build the package, as pip would fetch it.
    found, wanted, seen = {}, [(Requirement(line).name, "") for line in (*lines, "setuptools")], set()
    while wanted:
        name, extra = wanted.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        package = metadata.distribution(name)
        tops = {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}
        found.update({top: Path(package.locate_file(top)) for top in tops})
        for requirement in map(Requirement, package.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted += [(requirement.name, part) for part in ("", *requirement.extras)]
    return found


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of an environment in which como_jax is installed, and no JAX."""
    environment, source = tmp_path / "environment", tmp_path / "source"
    venv.create(environment, symlinks=True)
    scheme = {"base": str(environment), "platbase": str(environment)}
    packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    for name, path in needed_packages().items():
        (packages / name).symlink_to(path)
    # A copy, since building leaves things behind.
    shutil.copytree(REPOSITORY / "como_jax", source / "como_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, source / name)
    interpreter = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-index", "--quiet"]
    subprocess.run([*install, "--no-build-isolation", "--no-compile", "--no-deps", source], check=True)
    # Nothing is left to install, so that this works without an index.
    subprocess.run([*install, "-r", REQUIREMENTS], check=True)
    return interpreter


@pytest.mark.slow
def test_a_robot_without_jax_encodes_what_this_machine_encodes(python: Path, exported: Path, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 2, 48, 64, 3), dtype=np.uint8)
    np.save(tmp_path / "frames.npy", frames)
    arguments = [exported, tmp_path / "frames.npy", tmp_path / "latent.npy"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", SCRIPT, *map(str, arguments)], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    place, *requires = done.stdout.splitlines()
    assert Path(place).is_relative_to(tmp_path / "environment")
    # Without --no-deps, pip brings what the project's name promises.
    needed = {Requirement(line).name for line in requires if "extra ==" not in line}
    assert needed >= {"jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "ml-collections"}
    assert needed >= {"chex", "absl-py", "numpy", "safetensors"} and "torch" not in needed
    here = LatentMotion.from_pretrained(exported).encode(frames).latent.numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "latent.npy"), here)
