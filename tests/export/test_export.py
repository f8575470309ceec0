"""The command line, and the folder that it makes."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from como_jax.errors import OutputError
from como_jax.export import labels
from como_jax.export.labels import export_labels
from como_jax.ownership import MARK
from como_jax.staging import new_folder

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.labels.export", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_an_export_says_what_it_wrote_and_where(labelled, tmp_path):
    result = run("lerobot", "--data", labelled, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    first, second, last = result.stdout.splitlines()
    assert first.startswith("dataset tabletop: train ") and first.endswith("; cameras: image")
    assert "latent_motion (6), latent_codes (2)" in second
    assert last == f"lerobot dataset in {tmp_path / 'out'}"
    assert (tmp_path / "out/meta/info.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "24/24" in result.stderr


def test_an_unlabelled_dataset_is_one_line_and_status_2(tabletop_dataset, tmp_path):
    result = run("rlds", "--data", tabletop_dataset, "--out", tmp_path / "out")
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {tabletop_dataset}, split 'train' is not labelled: ")
    assert not list(tmp_path.iterdir())


def test_the_format_must_be_known(tmp_path):
    result = run("hdf5", "--data", tmp_path, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr == "error: expected the name of one format: rlds, lerobot\n"


def test_a_folder_appears_when_it_is_complete(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
        assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == [MARK, "file", "out"]


def test_what_failed_leaves_the_older_dataset_alone(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("old")
    with pytest.raises(ValueError), new_folder(tmp_path / "out", True) as folder:
        (folder / "file").write_text("new")
        raise ValueError
    assert (tmp_path / "out/file").read_text() == "old"
    with new_folder(tmp_path / "out", True) as folder:
        (folder / "other").write_text("new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == [MARK, "other", "out"]


@pytest.mark.parametrize(
    ("out", "overwrite", "message"),
    [
        ("data", True, "lies inside `data`"),
        ("data/inside", False, "lies inside `data`"),
        (".", True, "holds what is read: `data`"),
        ("file", True, "is not a directory"),
        ("other", False, "exists already; `overwrite` replaces it"),
        ("other", True, "was not made by this project"),
        ("file/out", False, "cannot write to"),
    ],
)
def test_an_output_that_is_in_the_way(tmp_path, monkeypatch, out, overwrite, message):
    (tmp_path / "data").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("")
    monkeypatch.setattr(labels, "WRITERS", {"rlds": lambda *_: pytest.fail("there should be no folder")})
    with pytest.raises(OutputError, match=message):
        export_labels(SimpleNamespace(directory=tmp_path / "data"), "rlds", tmp_path / out, overwrite)


def test_buckets_are_refused(tmp_path):
    with pytest.raises(OutputError, match="a folder of this machine"):
        export_labels(SimpleNamespace(directory=tmp_path), "rlds", "gs://bucket/out")
