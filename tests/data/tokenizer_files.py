"""Files of small tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest

WORDS = ("push", "the", "red", "blue", "cube")
ENDS = {"clip": ("<|startoftext|>", "<|endoftext|>"), "t5": ("</s>",)}


def write_tokenizer(path: Path, kind: str) -> Path:
    """Writes a tokenizer.json of a few words, with the special tokens of CLIP or T5; skips without the library."""
    tokenizers = pytest.importorskip("tokenizers")
    *_, end = ends = ENDS[kind]
    # Token 0 is a word, as in CLIP.
    vocabulary = {word: number for number, word in enumerate((*WORDS, "<unk>", *ends))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(ends))
    single = f"{ends[0]} $A {end}" if kind == "clip" else f"$A {end}"
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=[(token, vocabulary[token]) for token in ends]
    )
    # What a published file may ask for, and would do harm here.
    tokenizer.enable_padding(length=20, pad_token=end, pad_id=vocabulary[end])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    return path
