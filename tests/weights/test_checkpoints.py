"""Reading of foreign files: what is in them, and that nothing in them runs."""

from __future__ import annotations

import argparse
import builtins
import json
import pickle
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from como_jax.errors import RunError
from como_jax.weights.tensors import Weights, read_weights

torch = pytest.importorskip("torch")

TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(2, np.float32)}


def state_dict() -> dict[str, Any]:
    return {name: torch.tensor(tensor) for name, tensor in TENSORS.items()}


def check(weights: Weights) -> None:
    assert sorted(weights.files) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(weights.take(name, tensor.shape), tensor)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_files_of_all_kinds_are_read_by_themselves_or_in_a_folder(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    save_file(TENSORS, path) if suffix == ".safetensors" else torch.save(state_dict(), path)
    check(read_weights(path))
    check(read_weights(tmp_path))


def test_an_older_pytorch_file_is_read(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    check(read_weights(tmp_path / "old.pth"))


def test_weights_are_found_beside_a_training_program_s_state(tmp_path: Path) -> None:
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in state_dict().items()}
    content = {"model": wrapped, "optimizer": {"lr": 0.1}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "checkpoint.pth")
    weights = read_weights(tmp_path / "checkpoint.pth")
    check(weights)
    assert weights.beside == ("optimizer", "epoch", "args")


def test_several_files_of_an_index_are_read_together(tmp_path: Path) -> None:
    names = {name: f"part{number}.safetensors" for number, name in enumerate(TENSORS)}
    for name, file in names.items():
        save_file({name: TENSORS[name]}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    weights = read_weights(tmp_path)
    check(weights)
    assert [path.name for path in weights.read_from] == [index.name, "part0.safetensors", "part1.safetensors"]
    index.write_text(json.dumps({"weight_map": names | {"b": "part0.safetensors"}}))
    with pytest.raises(RunError, match="names 1 tensors that no file has, such as b"):
        read_weights(index)
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(RunError, match=r"names part1\.safetensors, which is not beside it"):
        read_weights(index)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_half_precision_is_read(tmp_path: Path, half: str) -> None:
    torch.save({"a": torch.arange(4.0).to(getattr(torch, half))}, tmp_path / "a.pt")
    save_file({"a": np.arange(4.0).astype(getattr(ml_dtypes, half, np.float16))}, tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        np.testing.assert_array_equal(read_weights(tmp_path / name).take("a", (4,)).astype(np.float32), np.arange(4.0))


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({str(self.marker)!r}, 'w').write('ran')",))


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle", "beside"])
def test_a_malicious_pickle_does_not_run(tmp_path: Path, how: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "weights.bin"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Malicious(marker)))
    else:
        content = {"model": state_dict(), "extra": Malicious(marker)} if how == "beside" else Malicious(marker)
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    reason = "something that is no tensor" if how == "pickle" else r"\w*\.?exec"
    with pytest.raises(RunError, match=rf"weights\.bin holds more than tensors.*is not read: {reason}"):
        read_weights(path)
    assert not marker.exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    # It would have, read in the careless way.
    assert marker.read_text() == "ran"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["cut", "garbled", "empty"])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"weights{suffix}"
    save_file(TENSORS, path) if suffix == ".safetensors" else torch.save(state_dict(), path)
    content = path.read_bytes()
    path.write_bytes({"cut": content[:-20], "garbled": b"\x93garbage" * 20, "empty": b""}[damage])
    with pytest.raises(RunError, match=rf"weights\{suffix} (cannot be read|holds more than tensors)") as caught:
        read_weights(path)
    assert "\n" not in str(caught.value)


def test_without_pytorch_its_files_are_refused_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state_dict(), tmp_path / "weights.pth")
    real = builtins.__import__

    def fail(name: str, *rest: Any, **options: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(RunError, match=r"which only PyTorch reads: pip install 'como_jax\[torch\]'"):
        read_weights(tmp_path / "weights.pth")


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    for name, message in (("none", "does not exist"), ("", "holds no weights file")):
        with pytest.raises(RunError, match=message):
            read_weights(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(RunError, match="holds no state_dict, neither on top nor under model, state_dict"):
        read_weights(tmp_path)
    torch.save(state_dict(), tmp_path / "b.pt")
    with pytest.raises(RunError, match=r"holds more than one weights file \(a\.pt, b\.pt\); name the file itself"):
        read_weights(tmp_path)
    (tmp_path / "c.txt").touch()
    with pytest.raises(RunError, match=r"c\.txt is none of \.safetensors, \.pt"):
        read_weights(tmp_path / "c.txt")
    torch.save({"a": torch.eye(2).to_sparse()}, tmp_path / "d.pt")
    with pytest.raises(RunError, match="tensor a is no plain array of numbers"):
        read_weights(tmp_path / "d.pt")


def test_tensors_that_do_not_fit_or_are_not_finite_are_refused() -> None:
    weights = Weights(epath.Path("a.pt"), {"a": np.array([1.0, np.nan]), "b.0.c": np.ones(2), "b.2.c": np.ones(2)})
    for name, shape, message in (
        ("c", (2,), "no tensor c, which this format needs"),
        ("b.0.c", (3,), r"tensor b\.0\.c is \(2,\) and must be \(3,\)"),
        ("a", (2,), "tensor a holds numbers that are not finite; the file is damaged"),
    ):
        with pytest.raises(RunError, match=message):
            weights.take(name, shape)
    assert weights.depth("b.{layer}.c") == 3
    other = Weights(epath.Path("b.pt"), {"a": np.zeros(2), "d": np.ones(1)})
    with pytest.raises(RunError, match=r"a\.pt and b\.pt hold different tensors a"):
        weights.merged(other)
