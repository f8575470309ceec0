"""The runtime installs and works where there is no JAX, with what the extra `torch` needs and nothing else."""

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
NEEDED = ("torch", "numpy", "safetensors", "opencv-python-headless", "setuptools")
SCRIPT = """
import importlib.util, sys
import numpy as np
from como_jax.runtime_torch.latent_motion import LatentMotion
motion = LatentMotion.from_pretrained(sys.argv[1]).encode(np.load(sys.argv[2]))
np.save(sys.argv[3], motion.latent.numpy())
found = [name for name in ("jax", "jaxlib", "flax", "chex", "etils", "absl") if importlib.util.find_spec(name)]
foreign = [name for name in sys.modules if name.startswith("como_jax.") and "runtime_torch" not in name]
assert not found and not foreign, (found, foreign)
import como_jax
print(como_jax.__file__)
"""


def needed_packages() -> dict[str, Path]:
    """Files and folders of all packages that are needed, and of those that these need, by their names."""
    found, wanted, seen = {}, [(name, "") for name in NEEDED], set()
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
    options = ["--no-index", "--no-build-isolation", "--no-compile", "--quiet"]
    command = [sys.executable, "-m", "pip", "--python", interpreter, "install", *options, f"{source}[torch]"]
    subprocess.run(command, check=True)
    return interpreter


def test_a_robot_without_jax_encodes_what_this_machine_encodes(python: Path, exported: Path, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 2, 48, 64, 3), dtype=np.uint8)
    np.save(tmp_path / "frames.npy", frames)
    arguments = [exported, tmp_path / "frames.npy", tmp_path / "latent.npy"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", SCRIPT, *map(str, arguments)], cwd=tmp_path, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "environment")
    here = LatentMotion.from_pretrained(exported).encode(frames).latent.numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "latent.npy"), here)
