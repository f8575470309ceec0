"""Only what this project made is ever replaced."""

import json
import os
import shutil
from pathlib import Path

import pytest
from etils import epath

from como_jax.errors import OutputError, RunError
from como_jax.files import check_file_output, write_figures
from como_jax.ownership import MARK, claim, strangers
from como_jax.pages import render_page
from como_jax.staging import Staging, check_apart, check_output, new_folder, real_output
from como_jax.training.run import RUN_FILES, check_workdir
from configs import pretrain_mae


@pytest.fixture
def made(tmp_path):
    """A folder that this project made."""
    with new_folder(tmp_path / "made") as folder:
        (folder / "meta").mkdir()
        (folder / "meta/info.json").write_text("{}")
        (folder / "records").write_text("steps")
        (folder / "nothing").mkdir()
    return epath.Path(tmp_path / "made")


def test_what_was_made_is_replaced(made):
    assert strangers(made) == []
    (made / ".DS_Store").write_text("of a desktop")
    with new_folder(made, overwrite=True) as folder:
        (folder / "records").write_text("others")
    assert sorted(path.name for path in made.iterdir()) == [MARK, "records"]


@pytest.mark.parametrize(
    ("name", "add"),
    [
        ("raw/new.mp4", lambda path: (path.parent.mkdir(), path.write_text("the only recording"))),
        ("meta/notes.txt", lambda path: path.write_text("notes")),
        ("records", lambda path: path.write_text("steps, corrected by hand")),
        ("raw", lambda path: path.symlink_to("/")),
        ("plans/", lambda path: path.mkdir()),
        (".git/config", lambda path: (path.parent.mkdir(), path.write_text("history"))),
    ],
)
def test_what_was_added_or_changed_is_kept(made, name, add):
    add(Path(made) / name)
    assert strangers(made) == [name]
    with pytest.raises(OutputError, match=f"holds what this project did not make.*: {name}; `overwrite` would"):
        check_output(made, overwrite=True)
    with pytest.raises(OutputError, match="did not make"), new_folder(made, overwrite=True):
        pytest.fail("there should be no folder")
    assert (made / "meta/info.json").exists()


def test_what_is_added_while_the_new_folder_is_made_is_kept(made):
    with pytest.raises(OutputError, match=r"did not make.*: photo\.jpg"), new_folder(made, overwrite=True) as folder:
        (folder / "records").write_text("others")
        (made / "photo.jpg").write_text("precious")
    assert (made / "photo.jpg").exists() and (made / "records").read_text() == "steps"
    assert [path.name for path in made.parent.iterdir()] == ["made"]


def foreign_rlds(folder: Path) -> None:
    for name in ("dataset_info.json", "features.json", "conversion_report.json"):
        (folder / name).write_text("{}")


def foreign_lerobot(folder: Path) -> None:
    (folder / "meta").mkdir()
    (folder / "meta/info.json").write_text("{}")


@pytest.mark.parametrize("make", [foreign_rlds, foreign_lerobot])
@pytest.mark.parametrize("by_link", [False, True])
def test_foreign_datasets_are_kept(tmp_path, make, by_link):
    out = tmp_path / "foreign"
    out.mkdir()
    make(out)
    if by_link:
        (tmp_path / "link").symlink_to(out)
        out = tmp_path / "link"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match="was not made by this project"), new_folder(out, overwrite=True):
        pytest.fail("there should be no folder")
    with pytest.raises(OutputError, match="was not made by this project"):
        check_output(real_output(out), overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_what_was_made_stays_a_link(made):
    link = made.with_name("link")
    Path(link).symlink_to(made)
    assert real_output(link) == epath.Path(os.path.realpath(made))
    with new_folder(link, overwrite=True) as folder:
        (folder / "records").write_text("others")
    assert os.path.islink(link) and (made / "records").read_text() == "others"
    assert sorted(path.name for path in made.parent.iterdir()) == ["link", "made"]


def test_a_copy_of_what_was_made_is_known(made):
    shutil.copytree(made, made.with_name("copy"))
    check_output(made.with_name("copy"), overwrite=True)


@pytest.mark.parametrize(
    ("out", "source", "message"),
    [
        ("clips", "clips", "lies inside"),
        ("clips/out", "clips", "lies inside"),
        ("out", "out/raw", "holds what is read"),
        ("out", "out.partial/raw", "holds what is read"),
        ("to_clips/out", "clips", "lies inside"),
        ("clips/to_other/out", "clips", "lies inside"),
        ("other/out", "clips", "lies inside .*by the link"),
        ("out", "to_raw", "holds what is read"),
        ("to_out", "out/raw", "holds what is read"),
        ("out", "linked", "holds what is read.*by the link .*linked/deep/raw"),
        ("out", "chained", "holds what is read.*by the link"),
    ],
)
def test_output_and_source_lie_apart(tmp_path, monkeypatch, out, source, message):
    for name in ("clips", "other", "out/raw", "out.partial/raw", "linked/deep", "chained"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "out/raw/new.mp4").write_text("the only recording")
    for link, target in (
        ("to_clips", "clips"),
        ("clips/to_other", "other"),
        ("clips/loop", "clips"),
        ("to_raw", "out/raw"),
        ("to_out", "out"),
        ("linked/deep/raw", "out/raw/new.mp4"),
        ("chained/on", "linked"),
    ):
        (tmp_path / link).symlink_to(tmp_path / target)
    for root in (tmp_path, Path()):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(OutputError, match=message):
            check_apart(epath.Path(root / out), str(root / source))
    check_apart(epath.Path(tmp_path / "elsewhere"), str(tmp_path / source))
    check_apart(epath.Path("gs://bucket/clips/out"), "gs://bucket/clips")


@pytest.mark.parametrize("names", [["notes.txt"], ["dataset/recording.mp4"], ["plan.json", "lock", "mine.mp4"]])
def test_a_folder_of_the_name_of_the_staging_folder_is_kept(tmp_path, names):
    for name in names:
        path = tmp_path / "out.partial" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    with pytest.raises(OutputError, match="works, holds what this project did not make"):
        Staging(epath.Path(tmp_path / "out"), "conversion").locked().__enter__()
    assert all((tmp_path / "out.partial" / name).read_text() == "mine" for name in names)


def test_a_linked_staging_folder_and_what_is_put_into_one_are_kept(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="is a link"):
        Staging(epath.Path(tmp_path / "out"), "conversion").locked().__enter__()
    with Staging(epath.Path(tmp_path / "other"), "conversion").locked():
        (tmp_path / "other.partial/mine.mp4").write_text("put there meanwhile")
    assert os.listdir(tmp_path / "other.partial") == ["mine.mp4"]


def test_a_page_of_somebody_else_is_kept(tmp_path):
    (tmp_path / "template").write_text('<html><meta name="generator" content="como_jax"><p>{{ text }}</html>')
    page = tmp_path / "page.html"
    for text in ("one", "two"):
        render_page(page, tmp_path / "template", text=text)
    assert "two" in page.read_text()
    page.write_text("<html>my own page</html>")
    with pytest.raises(OutputError, match=r"page\.html was not made by this project"):
        render_page(page, tmp_path / "template", text="three")
    assert "my own page" in page.read_text()


def test_figures_replace_only_figures(tmp_path):
    path = tmp_path / "new" / "found.json"
    for value in (1, 2):
        write_figures(path, {"value": value})
    assert json.loads(path.read_text()) == {"made_by": "como_jax", "value": 2}
    os.mkfifo(tmp_path / "pipe")
    for content in ('{"value": 3}', "my notes", "x" * 2000 + '"made_by": "como_jax"'):
        (tmp_path / "mine").write_text(content)
        with pytest.raises(OutputError, match="mine was not made by this project, and is not replaced"):
            write_figures(tmp_path / "mine", {})
        assert (tmp_path / "mine").read_text() == content
    for name in ("new", "pipe"):
        with pytest.raises(OutputError, match=f"{name} is no file, and is not replaced"):
            check_file_output(tmp_path / name)
    (tmp_path / "empty").touch()
    for name in ("empty", "missing", "new/found.json"):
        check_file_output(tmp_path / name)


def test_single_files_are_claimed(tmp_path):
    folder = epath.Path(tmp_path)
    claim(folder, ["table.md"])
    (folder / "table.md").write_text("of this project")
    claim(folder, ["table.md", "table.csv"])
    (folder / "figure.png").write_text("of somebody else")
    with pytest.raises(OutputError, match=r"figure\.png was not made by this project"):
        claim(folder, ["table.md", "figure.png"])
    # The folder as a whole is still somebody else's.
    with pytest.raises(OutputError, match=r"did not make.*figure\.png"):
        check_output(folder, overwrite=True)


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_does_not_begin_among_foreign_files(tmp_path, name):
    (tmp_path / name / "100").mkdir(parents=True)
    with pytest.raises(RunError, match=f"holds {name} but no config.json"):
        check_workdir(tmp_path, pretrain_mae.get_config("smoke"))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "damaged"), ("[1]", "damaged"), ('{"model_type": "vit"}', "is not of a run")]
)
def test_a_run_does_not_begin_beside_a_foreign_config(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RunError, match=message):
        check_workdir(tmp_path, pretrain_mae.get_config("smoke"))
    assert (tmp_path / "config.json").read_text() == text
