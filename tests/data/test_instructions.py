"""Instructions of episodes as a text tower reads them."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest
from ml_collections import ConfigDict

from como_jax.data.instructions import InstructionReader, InstructionTable, write_embeddings
from como_jax.data.pipeline import training_batches
from como_jax.data.policy_data import open_policy_data
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError
from como_jax.weights.instructions import read_instructions
from tests.data.robots import make_robot
from tests.export.conftest import change_tables
from tests.policies.smoke_policies import smoke

BYTES = ConfigDict({"tower": "bytes", "max_length": 8, "prompt": "{}", "tokenizer_file": ""})
EMBEDDING = ConfigDict({**BYTES, "tower": "embedding"})


@pytest.fixture(scope="module")
def silent(tmp_path_factory: pytest.TempPathFactory) -> EpisodeSource:
    """Two of three episodes are without instruction."""
    directory = tmp_path_factory.mktemp("robots") / "silent"
    make_robot(directory, instructions=("push", "", " ", "wave"))
    return EpisodeSource(directory, "train")


def test_a_row_is_the_episode_s_instruction(arm: Path) -> None:
    source = EpisodeSource(arm, "train")
    table = InstructionTable.read(source, InstructionReader.make(BYTES, arm))
    assert table.key == "text" and table.rows.dtype == np.int32 and table.rows.shape == (3, 8)
    expected = [[*(byte + 1 for byte in text.encode()), *[0] * (8 - len(text))] for text in source.instruction]
    np.testing.assert_array_equal(table.rows, expected)


def test_an_instruction_is_read_once() -> None:
    calls: list[str] = []

    def read(text: str) -> np.ndarray:
        calls.append(text)
        return np.array([len(text)], np.int32)

    reader = InstructionReader("text", read)
    assert reader(["a", "bcd", "a"]).tolist() == [[1], [3], [1]] and reader(["bcd"]).tolist() == [[3]]
    assert calls == ["a", "bcd"]


def test_embeddings_come_from_the_dataset(arm: Path, tmp_path: Path) -> None:
    directory = tmp_path / "arm"
    shutil.copytree(arm, directory)
    source = EpisodeSource(directory, "train")
    with pytest.raises(DatasetError, match=f"{directory} has no instruction_embeddings.parquet"):
        InstructionReader.make(EMBEDDING, directory)
    vectors = {text: np.full(3, number, np.float32) for number, text in enumerate(source.instruction)}
    write_embeddings(directory, vectors)
    table = InstructionTable.read(source, InstructionReader.make(EMBEDDING, directory))
    assert table.key == "text_embedding" and table.rows.dtype == np.float32
    assert table.rows.tolist() == [[number] * 3 for number in range(3)]
    with pytest.raises(DatasetError, match="instruction_embeddings.parquet has no embedding of 'wave'"):
        InstructionTable.read(EpisodeSource(directory, "val"), InstructionReader.make(EMBEDDING, directory))


def test_missing_instructions_are_refused_by_name(silent: EpisodeSource) -> None:
    reader = InstructionReader.make(BYTES, silent.directory)
    with pytest.raises(
        DatasetError,
        match=r"silent \(train\): 2 of 3 episodes have no .*, the first is 'episode 1'.*data.missing_instructions",
    ):
        InstructionTable.read(silent, reader)
    with pytest.raises(ConfigError, match="missing_instructions 'emtpy' must be one of refuse, empty"):
        InstructionTable.read(silent, reader, "emtpy")


def test_empty_instructions_are_read_if_asked_for(silent: EpisodeSource) -> None:
    rows = InstructionTable.read(silent, InstructionReader.make(BYTES, silent.directory), "empty").rows
    assert (rows != 0).sum(axis=1).tolist() == [4, 0, 1]


def test_a_long_instruction_is_not_cut_off_in_silence(arm: Path) -> None:
    short = ConfigDict({**BYTES, "max_length": 6})
    with pytest.raises(
        ConfigError, match=r"'pull it' has 7 bytes, more than the 6 of text\.max_length; raise it to .* 7"
    ):
        InstructionTable.read(EpisodeSource(arm, "train"), InstructionReader.make(short, arm))


def test_an_unknown_tower_is_refused(arm: Path) -> None:
    with pytest.raises(ConfigError, match=r"text\.tower=words reads no tokens"):
        InstructionReader.make(ConfigDict({**BYTES, "tower": "words"}), arm)


def test_an_instruction_is_put_into_the_prompt(arm: Path) -> None:
    asked = ConfigDict({**BYTES, "prompt": "please {} now", "max_length": 32})
    source = EpisodeSource(arm, "train")
    plain = InstructionReader.make(ConfigDict({**BYTES, "max_length": 32}), arm)
    found = InstructionTable.read(source, InstructionReader.make(asked, arm)).rows
    np.testing.assert_array_equal(found, plain([f"please {text} now" for text in source.instruction]))
    # Braces of an instruction mean nothing.
    np.testing.assert_array_equal(InstructionReader.make(asked, arm)(["{} {0}"]), plain(["please {} {0} now"]))
    with pytest.raises(ConfigError, match="The instruction 'please pull it now' has 18 bytes, more than the 17"):
        InstructionTable.read(source, InstructionReader.make(ConfigDict({**asked, "max_length": 17}), arm))


@pytest.mark.parametrize("prompt", ["", "do it", "{} and {}", "{text}"])
def test_a_prompt_without_one_place_for_the_instruction_is_refused(arm: Path, prompt: str) -> None:
    with pytest.raises(ConfigError, match=r"text\.prompt .* must contain \{\} once"):
        InstructionReader.make(ConfigDict({**BYTES, "prompt": prompt}), arm)


def test_embeddings_made_beforehand_know_no_prompt(arm: Path, tmp_path: Path) -> None:
    write_embeddings(tmp_path, {"push": np.ones(3, np.float32)})
    reader = InstructionReader.make(ConfigDict({**EMBEDDING, "prompt": "please {}"}), tmp_path)
    assert reader(["push"]).tolist() == [[1, 1, 1]]


def test_of_several_texts_one_is_drawn_and_the_first_without_a_draw(arm: Path, tmp_path: Path) -> None:
    directory = tmp_path / "arm"
    shutil.copytree(arm, directory)
    others = {"push": ["shove", "move"], "lift": ["raise"]}
    change_tables(directory, lambda row: {**row, "other_instructions": others.get(row["language_instruction"])})
    reader = InstructionReader.make(BYTES, directory)
    table = InstructionTable.read(EpisodeSource(directory, "train"), reader)
    assert table.first.tolist() == [0, 3, 4, 6] and table.has_choice
    episodes, draws = np.array([0, 0, 0, 1, 2, 2]), np.array([0, 0.5, 0.99, 0.99, 0, 0.5])
    expected = reader(["push", "shove", "move", "pull it", "lift", "raise"])
    np.testing.assert_array_equal(table.choose(episodes, draws), expected)
    assert read_instructions(directory) == sorted(["push", "pull it", "lift", "wave", "shove", "move", "raise"])

    config = smoke("diffusion", directory, **{"data.image_size": 8, "text.tower": "bytes"})
    data = open_policy_data(config)
    first, second = (list(itertools.islice(training_batches(config, data.reader), 8)) for _ in range(2))
    chex.assert_trees_all_equal(first, second)
    seen = {episode: set() for episode in range(3)}
    for batch in first:
        for episode, text in zip(batch["episode"], batch["text"], strict=True):
            seen[int(episode)].add(bytes(text[text > 0].astype(np.uint8) - 1).decode())
    assert seen == {0: {"push", "shove", "move"}, 1: {"pull it"}, 2: {"lift", "raise"}}
    # What is read by number, as in evaluation, does not depend on how often it is read.
    chex.assert_trees_all_equal(*(data.reader.read(np.arange(4)) for _ in range(2)))
