"""Exported models that are incomplete, damaged, or from elsewhere are refused, with the reason."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")

from como_jax.errors import ModelFileError  # noqa: E402
from como_jax.runtime_torch.latent_motion import LatentMotion  # noqa: E402

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_weights(folder: Path, content: bytes) -> None:
    """Other weights, with their own sum in config.json."""
    (folder / WEIGHTS).write_bytes(content)
    set_config(folder, weights={"file": WEIGHTS, "sha256": hashlib.sha256(content).hexdigest()})


def set_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / "changed")
    set_weights(folder, (folder / "changed").read_bytes())


def flip(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-5] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def cut_off(folder: Path) -> None:
    set_weights(folder, (folder / WEIGHTS).read_bytes()[:-7])


def set_section(name: str, field: str, value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content[name][field] = value
        set_config(folder, **content)

    return change


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "is .* an exported model"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} cannot be read"),
    "a bit": (flip, "damaged or cut off"),
    "cut off with its own sum": (cut_off, "cannot be read as safetensors"),
    "config cut off": (lambda folder: (folder / "config.json").write_text('{"format": '), "is damaged"),
    "another project": (lambda folder: set_config(folder, format="other"), "describes no model of como_jax"),
    "a later version": (lambda folder: set_config(folder, format_version=3), "format version 3.*up to 2"),
    "a policy": (lambda folder: set_config(folder, kind="policy"), "kind is 'policy' and must be 'latent_motion'"),
    "unknown family": (lambda folder: set_config(folder, family="other"), "must be one of como, laq"),
    "unknown field": (set_section("model", "temperature", 1), "model.temperature is unknown"),
    "a field of another kind": (
        set_section("encoder", "depth", "two"),
        "encoder.depth is 'two' and must be of type int",
    ),
    "unknown input": (set_section("model", "motion_input", "sound"), "motion_input 'sound' .* one of difference"),
    "heads": (set_section("encoder", "num_heads", 5), "encoder has width 24, .* multiple of its 5 heads"),
    "a smaller model": (set_section("encoder", "depth", 1), "has encoder.blocks.1.*does not know"),
    "a larger model": (set_section("encoder", "depth", 3), "lacks encoder.blocks.2"),
    "another size": (
        lambda folder: set_tensors(folder, lambda tensors: tensors.update({"fdm.head.bias": np.zeros(5, np.float32)})),
        r"fdm.head.bias is \[5\] and by config.json must be \[768\]",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_folder_that_does_not_hold_what_was_exported_is_refused(damage: str, folder: Path) -> None:
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(ModelFileError, match=message):
        LatentMotion.from_pretrained(folder)


class Malice:
    """Makes a file wherever it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_in_place_of_the_weights_is_refused_and_does_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    content = pickle.dumps(Malice(mark))
    set_weights(folder, content)
    with pytest.raises(ModelFileError, match="cannot be read as safetensors"):
        LatentMotion.from_pretrained(folder)
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()


def test_weights_outside_the_folder_are_not_looked_for(folder: Path) -> None:
    elsewhere = shutil.move(folder / WEIGHTS, folder.parent / WEIGHTS)
    digest = hashlib.sha256(Path(elsewhere).read_bytes()).hexdigest()
    set_config(folder, weights={"file": f"../{WEIGHTS}", "sha256": digest})
    with pytest.raises(ModelFileError, match="cannot be read"):
        LatentMotion.from_pretrained(folder)
