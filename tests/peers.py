"""Environments of other tools that read what this project writes; tools/peers.sh makes them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

_LARGE = ("lerobot", "tensorflow")
_NOT_REACHED = 3


def peer_python(name: str) -> Path:
    """The interpreter of a tool's environment; skips the test where it is not asked for or cannot be made."""
    if name in _LARGE and os.environ.get("COMO_PEERS") != "all":
        pytest.skip(f"the environment of {name} is large; set COMO_PEERS=all to make it and to run this")
    script = Path(__file__).resolve().parents[1] / "tools" / "peers.sh"
    result = subprocess.run(["bash", script, name], capture_output=True, text=True, check=False)
    if result.returncode == _NOT_REACHED:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def run_peer(python: Path, code: str, *arguments: object) -> str:
    """Runs Python code in a tool's environment, offline, and returns what it prints."""
    command = [str(python), "-c", code, *map(str, arguments)]
    # Without this project's path, whose packages may need other versions.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout
