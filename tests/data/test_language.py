"""Tokenizers, embeddings made beforehand, and the command that makes them."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx
from safetensors.numpy import save_file

from como_jax.data import schema
from como_jax.data.episode_table import table_name, write_episodes
from como_jax.data.instructions import (
    EMBEDDINGS_NAME,
    read_embeddings,
    write_embeddings,
)
from como_jax.errors import ConfigError, DatasetError
from como_jax.nn.text_towers import make_text_tower
from como_jax.spec.tokenizers import ByteTokenizer, FileTokenizer, SentencePieceTokenizer, make_tokenizer
from como_jax.spec.towers import TextConfig
from como_jax.weights.text import load_text_tower, t5_table, text_config_of
from tests.data.tokenizer_files import WORDS, write_tokenizer
from tools.embed_instructions import embed_instructions


@pytest.fixture
def make_tokenizer_file(tmp_path: Path) -> Any:
    """See `write_tokenizer`."""
    return lambda kind: write_tokenizer(tmp_path / f"tokenizer_{kind}.json", kind)


@pytest.fixture
def make_sentencepiece_file(tmp_path: Path) -> Any:
    """Learns a .model file from a few sentences, of PaliGemma's kind unless told otherwise."""
    sentencepiece = pytest.importorskip("sentencepiece")

    def make(name: str = "tokens.model", **options: Any) -> Path:
        model = io.BytesIO()
        # As Gemma's: texts are taken as they are, a newline is a token of its own, and unknown characters are bytes.
        whole = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(WORDS[i:] + WORDS[:i]) for i in range(5)] * 3),
            model_writer=model,
            model_type="bpe",
            minloglevel=3,
            **{**whole, "vocab_size": 300, "byte_fallback": True, "user_defined_symbols": ["\n"], **options},
        )
        path = tmp_path / name
        path.write_bytes(model.getvalue())
        return path

    return make


def test_bytes_are_numbered_from_one_and_zero_ends_the_text() -> None:
    found = ByteTokenizer(6)(["ab", "", "é\0"])
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, [[98, 99, 0, 0, 0, 0], [0] * 6, [0xC4, 0xAA, 1, 0, 0, 0]])
    assert ByteTokenizer(6)([]).shape == (0, 6) and ByteTokenizer(6).vocabulary_size == 256


def test_an_instruction_that_does_not_fit_is_refused_with_its_length_in_bytes() -> None:
    ByteTokenizer(4)(["éé"])
    with pytest.raises(ConfigError, match=r"'ééa' has 5 bytes, more than the 4 of text.max_length; raise it to .* 5"):
        ByteTokenizer(4)(["a", "ééa"])


def test_a_file_tokenizer_adds_the_ends_and_neither_pads_nor_cuts(make_tokenizer_file: Any) -> None:
    clip, t5 = (FileTokenizer(make_tokenizer_file(kind), 8, kind) for kind in ("clip", "t5"))
    # One more than the tokens: 6 begins and 7 ends, and "push" is token 0.
    np.testing.assert_array_equal(clip(["push the red blue cube", ""]), [[7, 1, 2, 3, 4, 5, 8, 0], [7, 8] + [0] * 6])
    np.testing.assert_array_equal(t5(["push moon"]), [[1, 6, 7, 0, 0, 0, 0, 0]])
    assert (clip.vocabulary_size, t5.vocabulary_size) == (8, 7)
    with pytest.raises(ConfigError, match=r"'push push push push push push push' has 9 tokens, more than the 8"):
        clip(["push " * 6 + "push"])


def test_the_tokenizer_of_a_tower_is_made_by_name(make_tokenizer_file: Any) -> None:
    np.testing.assert_array_equal(make_tokenizer("bytes", 3, "")(["a"]), [[98, 0, 0]])
    np.testing.assert_array_equal(make_tokenizer("t5", 3, make_tokenizer_file("t5"))(["the"]), [[2, 7, 0]])
    with pytest.raises(ConfigError, match="text.tower=embedding reads no tokens"):
        make_tokenizer("embedding", 3, "")
    with pytest.raises(ConfigError, match="text.tower=clip needs text.tokenizer_file"):
        make_tokenizer("clip", 3, "")


def test_tokenizer_files_of_another_kind_are_refused(make_tokenizer_file: Any, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tokenizer_t5\.json does not put <\|startoftext\|> first, as the .* of clip"
    ):
        FileTokenizer(make_tokenizer_file("t5"), 8, "clip")
    with pytest.raises(ConfigError, match=r"tokenizer_clip\.json does not put </s> last, as the tokenizer of t5"):
        FileTokenizer(make_tokenizer_file("clip"), 8, "t5")
    with pytest.raises(ConfigError, match=r"nothing\.json does not exist"):
        FileTokenizer(tmp_path / "nothing.json", 8, "t5")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"broken\.json is not a tokenizer\.json"):
        FileTokenizer(tmp_path / "broken.json", 8, "t5")


def test_sentencepiece_puts_the_prompt_between_bos_and_a_newline(make_sentencepiece_file: Any) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = make_sentencepiece_file()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenize = SentencePieceTokenizer(path, 16)
    texts = ["push the red cube", "", "drücke  the\nblue cube"]
    found = tokenize(texts)
    assert (found.dtype, found.shape, tokenize.vocabulary_size) == (np.int32, (3, 16), 300)
    for text, row in zip(texts, found, strict=True):
        # The newline is never merged with what precedes it, so that it may be tokenized with the text.
        expected = processor.encode(f"{text}\n", add_bos=True)
        assert processor.decode(expected) == f"{text}\n"
        np.testing.assert_array_equal(row, [token + 1 for token in expected] + [0] * (16 - len(expected)))
    assert found[1, 0] == 1 + processor.bos_id() and found[1, 1] == 1 + processor.piece_to_id("\n")


def test_an_instruction_that_does_not_fit_is_refused_with_its_length_in_tokens(make_sentencepiece_file: Any) -> None:
    path = make_sentencepiece_file()
    length = int((SentencePieceTokenizer(path, 64)(["push the cube"]) > 0).sum())
    SentencePieceTokenizer(path, length)(["push the cube"])
    with pytest.raises(ConfigError, match=rf"'push the cube' has {length} tokens, more than the {length - 1} of text"):
        SentencePieceTokenizer(path, length - 1)(["push", "push the cube"])


def test_the_tokenizer_of_the_table_of_tokens_is_that_of_its_file(
    make_tokenizer_file: Any, make_sentencepiece_file: Any
) -> None:
    np.testing.assert_array_equal(make_tokenizer("tokens", 3, "")(["a"]), [[98, 0, 0]])
    # Those of any kind, with the ends that they themselves put.
    for kind, ids in (("t5", [[1, 7, 0, 0]]), ("clip", [[7, 1, 8, 0]])):
        np.testing.assert_array_equal(make_tokenizer("tokens", 4, make_tokenizer_file(kind))(["push"]), ids)
    path = make_sentencepiece_file()
    found = make_tokenizer("tokens", 16, path)
    np.testing.assert_array_equal(found(["the cube"]), SentencePieceTokenizer(path, 16)(["the cube"]))


def test_models_of_sentencepiece_that_do_not_serve_are_refused(make_sentencepiece_file: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.model does not exist"):
        SentencePieceTokenizer(tmp_path / "nothing.model", 8)
    for content in (b"", b"{}"):
        (tmp_path / "broken.model").write_bytes(content)
        with pytest.raises(ConfigError, match=r"broken\.model is not a \.model file of SentencePiece"):
            SentencePieceTokenizer(tmp_path / "broken.model", 8)
    with pytest.raises(ConfigError, match=r"headless\.model has no token <bos>"):
        SentencePieceTokenizer(make_sentencepiece_file("headless.model", bos_id=-1), 8)
    # As T5's, to which a newline is nothing but a space.
    t5 = {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": True, "remove_extra_whitespaces": True}
    lines = make_sentencepiece_file("lines.model", **t5, byte_fallback=False, vocab_size=40, user_defined_symbols=[])
    with pytest.raises(ConfigError, match=r"lines\.model has no token for a newline"):
        SentencePieceTokenizer(lines, 8)


@pytest.mark.parametrize(
    ("library", "make"),
    [
        ("tokenizers", lambda: FileTokenizer("tokenizer.json", 8, "clip")),
        ("sentencepiece", lambda: SentencePieceTokenizer("tokens.model", 8)),
    ],
)
def test_a_missing_library_is_named_with_its_install_line(
    monkeypatch: pytest.MonkeyPatch, library: str, make: Callable[[], Any]
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"needs the library {library} .*pip install {library}"):
        make()


def test_embeddings_come_back_as_they_were_written(tmp_path: Path) -> None:
    embeddings = {"": np.zeros(3, np.float32), "drücke": np.array([0.1, -2.0, 1e-30], np.float32)}
    assert write_embeddings(tmp_path, embeddings) == tmp_path / EMBEDDINGS_NAME
    found = read_embeddings(tmp_path)
    assert (len(found), found.size, "drücke" in found, "x" in found) == (2, 3, True, False)
    for instruction, embedding in embeddings.items():
        np.testing.assert_array_equal(found[instruction], embedding)
        assert found[instruction].dtype == np.float32


def test_an_instruction_without_embedding_is_named_with_the_command(tmp_path: Path) -> None:
    command = re.escape(f"python -m tools.embed_instructions --dataset {tmp_path}")
    with pytest.raises(DatasetError, match=rf"has no {EMBEDDINGS_NAME}\. Make it with: {command}"):
        read_embeddings(tmp_path)
    write_embeddings(tmp_path, {"go": np.zeros(3)})
    with pytest.raises(DatasetError, match=rf"no embedding of 'stop'\. Make it with: {command}"):
        read_embeddings(tmp_path)["stop"]


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        ({}, "has no embeddings"),
        ({"a": np.zeros(0)}, "has embeddings of sizes 0"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, "has embeddings of sizes 2, 3; all must have the same size"),
        ({"a": np.zeros(2), "b": np.array([1.0, np.nan])}, "of 'b' holds numbers that are not finite"),
    ],
)
def test_embeddings_that_do_not_fit_are_neither_written_nor_read(
    tmp_path: Path, embeddings: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(DatasetError, match=message):
        write_embeddings(tmp_path, embeddings)
    assert not list(tmp_path.iterdir())
    write_table(tmp_path, {"instruction": list(embeddings), "embedding": [x.tolist() for x in embeddings.values()]})
    with pytest.raises(DatasetError, match=message):
        read_embeddings(tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"instruction": ["a"], "vector": [[1.0]]}, "must be Parquet with instruction: string, embedding: list"),
        ({"instruction": ["a"], "embedding": ["b"]}, "must be Parquet with"),
        ({"instruction": ["a"], "embedding": [None]}, "must be Parquet with"),
        ({"instruction": ["a", "a"], "embedding": [[1.0], [2.0]]}, "two embeddings of 'a'"),
    ],
)
def test_tables_of_another_form_are_refused(tmp_path: Path, table: dict[str, list], message: str) -> None:
    write_table(tmp_path, table)
    with pytest.raises(DatasetError, match=message):
        read_embeddings(tmp_path)


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / EMBEDDINGS_NAME).write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="cannot be read; it must be Parquet"):
        read_embeddings(tmp_path)


def write_table(directory: Path, columns: dict[str, list]) -> None:
    pq.write_table(pa.table(columns), directory / EMBEDDINGS_NAME)


def make_dataset(directory: Path, **instructions: list[str]) -> Path:
    """Episode tables with these instructions for each split."""
    directory.mkdir()
    for split, texts in instructions.items():
        episodes = [
            schema.Episode(f"{split}{number}", "source", 5.0, [], np.zeros(0, np.float32), text)
            for number, text in enumerate(texts)
        ]
        write_episodes(directory / table_name(split), [schema.episode_row(episode) for episode in episodes])
    return directory


@pytest.fixture
def t5_weights(tmp_path: Path) -> Path:
    """Random weights of a tiny T5 encoder, config.json beside them."""
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 10}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", **sizes}))
    weights = tmp_path / "model.safetensors"
    rng, tensors = np.random.default_rng(0), {}
    for entry in t5_table(text_config_of(weights, TextConfig(tower="t5")), "shared.weight").values():
        for name in entry.names:
            tensors[name.format(layer=0)] = rng.normal(size=entry.shape).astype(np.float32)
    save_file(tensors, weights)
    return weights


@pytest.mark.slow
def test_the_command_embeds_all_instructions_of_all_splits(
    tmp_path: Path, make_tokenizer_file: Any, t5_weights: Path
) -> None:
    many = [" ".join(WORDS[: 1 + number % 5]) + " cube" * (number // 5) for number in range(35)]
    dataset = make_dataset(tmp_path / "dataset", train=[*many, "push", "push"], val=["blue cube"])
    tokenizer = make_tokenizer_file("t5")
    command = ("--dataset", dataset, "--tower", "t5", "--weights", t5_weights, "--tokenizer", tokenizer)
    result = subprocess.run(
        [sys.executable, "-m", "tools.embed_instructions", *map(str, command)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={"JAX_PLATFORMS": "cpu", "PATH": ""},
    )
    assert result.returncode == 0, result.stderr
    wanted = {*many, "push", "blue cube"}
    assert f"{len(wanted)} instructions embedded in 8 numbers each" in result.stderr
    found = read_embeddings(dataset)
    assert len(found) == len(wanted)
    # One by one and without the command.
    config = text_config_of(t5_weights, TextConfig(tower="t5", max_length=16))
    module = nnx.eval_shape(lambda: make_text_tower(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    tower = nnx.merge(nnx.split(module)[0], jax.device_put(load_text_tower(t5_weights)))
    tokenize = FileTokenizer(tokenizer, 16, "t5")
    for instruction in ("push", "blue cube", many[-1]):
        np.testing.assert_allclose(
            found[instruction], tower.read(tokenize([instruction])).pooled[0], rtol=1e-4, atol=1e-5
        )


def test_episodes_without_instruction_are_said_and_embedded(
    tmp_path: Path, make_tokenizer_file: Any, t5_weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_dataset(tmp_path / "dataset", train=["push", ""], val=[""])
    found = embed_instructions(dataset, "t5", t5_weights, make_tokenizer_file("t5"))
    assert sorted(found) == ["", "push"]
    assert "2 of 3 episodes have no instruction" in caplog.text


def test_what_does_not_belong_together_is_refused(tmp_path: Path, make_tokenizer_file: Any, t5_weights: Path) -> None:
    dataset, tokenizer = make_dataset(tmp_path / "dataset", train=["push"]), make_tokenizer_file("t5")
    with pytest.raises(DatasetError, match="is not a dataset directory: it has no episode tables"):
        embed_instructions(tmp_path, "t5", t5_weights, tokenizer)
    with pytest.raises(ConfigError, match="weights of the text tower 't5', but text.tower is 'clip'"):
        embed_instructions(dataset, "clip", t5_weights, tokenizer)
    with pytest.raises(ConfigError, match="'push' has 2 tokens, more than the 1 of text.max_length"):
        embed_instructions(dataset, "t5", t5_weights, tokenizer, max_length=1)
    config = json.loads(t5_weights.with_name("config.json").read_text())
    t5_weights.with_name("config.json").write_text(json.dumps({**config, "vocab_size": 6}))
    with pytest.raises(ConfigError, match="has 7 tokens and .* only 6: they do not belong together"):
        embed_instructions(dataset, "t5", t5_weights, tokenizer)
    assert not (dataset / EMBEDDINGS_NAME).exists()
