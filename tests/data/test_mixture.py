"""What a mixture is made of, as a list or as a TOML file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from como_jax.data.clips import ClipConfig
from como_jax.data.mixture import Mixture, MixtureEntry, mixture_text, parse_mixture
from como_jax.data.sources import load_normalizer
from como_jax.errors import DatasetError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", [("a/b", 1.0)]),
        ("a=2, b=0.5 ,c", [("a", 2.0), ("b", 0.5), ("c", 1.0)]),
        ("dir=with=3", [("dir=with", 3.0)]),
    ],
)
def test_a_mixture_names_directories_and_weights(text: str, expected: list[tuple[str, float]]) -> None:
    assert [(entry.directory, entry.weight) for entry in parse_mixture(text)] == expected


@pytest.mark.parametrize("text", ["a=", "a=x", "a=0", "a=-1", "a=inf", "a=nan"])
def test_a_weight_that_is_no_positive_number_is_refused(text: str) -> None:
    with pytest.raises(DatasetError, match=f"'{text}': what follows the last '=' is the weight .* a positive number"):
        parse_mixture(text)


@pytest.mark.parametrize("name", ["name=2026-11", "name=2026"])
def test_a_name_that_looks_like_a_weight_is_explained(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DatasetError, match=f"belongs to the name of the folder, give a weight too: .*/{name}=1"):
        parse_mixture(str(tmp_path / name))
    [entry] = parse_mixture(f"{tmp_path / name}=1")
    assert (entry.directory, entry.weight) == (str(tmp_path / name), 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:val", ("a", 1.0, "val")),
        ("a:train=2", ("a", 2.0, "train")),
        ("gs://b/a:val=0.5", ("gs://b/a", 0.5, "val")),
        ("gs://b/a", ("gs://b/a", 1.0, "train")),
        ("a:test", ("a:test", 1.0, "train")),
        ('[[dataset]]\ndirectory = "a"\nsplit = "val"', ("a", 1.0, "val")),
    ],
)
def test_a_mixture_names_the_split_to_train_on(text: str, expected: tuple[str, float, str]) -> None:
    [entry] = parse_mixture(text)
    assert (entry.directory, entry.weight, entry.split) == expected


def test_a_dataset_with_held_out_episodes_alone_says_how_to_train_on_them(
    tabletop_dataset: Path, tmp_path: Path
) -> None:
    only = tmp_path / "only"
    shutil.copytree(tabletop_dataset, only)
    info = json.loads((only / "dataset_info.json").read_text())
    info["splits"] = [split for split in info["splits"] if split["name"] == "val"]
    (only / "dataset_info.json").write_text(json.dumps(info))
    for path in only.glob("*train*"):
        path.unlink()
    clips = ClipConfig(0.3)
    with pytest.raises(DatasetError, match=f"it has: val. To train on 'val', write {only}:val in `data`"):
        Mixture.open(parse_mixture(str(only)), "train", clips)
    with pytest.raises(DatasetError, match="no split 'test' to train on; a split is one of train, val"):
        Mixture.open(parse_mixture(f"{only}:test"), "train", clips)
    [entry] = parse_mixture(f"{only}:val")
    [part] = Mixture.open([entry], "train", clips).parts
    assert part.source.split == "val" and entry.uses == ["train"]
    values = part.source.action
    for kind in ("min_max", "uniform"):
        scaled = load_normalizer(only, "action", kind, entry.split)(values)
        np.testing.assert_allclose([scaled.min(), scaled.max()], [-1, 1], atol=1e-6)


@pytest.mark.parametrize("text", ["", " , "])
def test_an_empty_mixture_is_refused(text: str) -> None:
    with pytest.raises(DatasetError, match="names no dataset; it must be DIR"):
        parse_mixture(text)


MIXTURE = """
[[dataset]]
directory = "{0}"
weight = 3
[[dataset]]
directory = "{0}"
gap_seconds = 0.2
max_motion = 0.5
fit = "stretch"
"""


def test_a_file_says_what_is_particular_to_each_dataset(tabletop_dataset: Path, tmp_path: Path) -> None:
    path = tmp_path / "mixture.toml"
    path.write_text(MIXTURE.format(tabletop_dataset))
    entries = parse_mixture(str(path))
    assert entries == parse_mixture(mixture_text(str(path))), "a run remembers the file's text"
    assert entries[0] == MixtureEntry(str(tabletop_dataset), 3)
    mixture = Mixture.open(entries, "train", ClipConfig(0.5, max_motion=0.9))
    assert [part.clips.gap_seconds for part in mixture.parts] == [0.5, 0.2]
    assert [part.clips.max_motion for part in mixture.parts] == [0.9, 0.5]
    assert mixture.weights.tolist() == [0.75, 0.25]
    rate = mixture.parts[0].source.control_rate[0]
    assert [part.index.gap[0] for part in mixture.parts] == [round(0.5 * rate), round(0.2 * rate)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[dataset]]\nwieght = 2.0", "number 1 of the mixture has no field 'wieght'; did you mean weight?"),
        ("[[dataset]]\nweight = 2.0", "number 1 of the mixture lacks its directory"),
        ("[[dataset]]\ndirectory = 'a'\nweight = 'b'", "weight must be a number, not 'b'"),
        ("[[dataset]]\ndirectory = 'a'\nweight = 0", "weight must be a positive number, not 0"),
        ("[[dataset]]\ndirectory = 3", "directory must be a string, not 3"),
        ("[[dataset]]\ndirectory = 'a'\nfit = 'pad'", "fit must be one of crop, stretch, not 'pad'"),
        (
            "[[dataset]]\ndirectory = 'a'\nnormalization = 'std'",
            "normalization must be one of none, .* not 'std'",
        ),
        ("[[dataset]]\ndirectory = 'a'\n[[data]]", r"consists of \[\[dataset\]\] sections only"),
        ("[[dataset]]\ndirectory =", "not valid TOML"),
        ("nowhere.toml", "nowhere.toml cannot be read"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        parse_mixture(text)
