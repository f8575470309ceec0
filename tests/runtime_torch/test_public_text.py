"""Policies that read instructions with CLIP or T5: the same tokens, and the same of them, as in training."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from como_jax.data.instructions import InstructionReader
from como_jax.errors import ConfigError
from tests.data.tokenizer_files import write_tokenizer

torch = pytest.importorskip("torch")

from como_jax.errors import InputError, ModelFileError  # noqa: E402
from como_jax.export.pytorch.parity import relative_error  # noqa: E402
from como_jax.runtime_torch.instructions import make_reader  # noqa: E402
from como_jax.runtime_torch.noise import GivenNoise  # noqa: E402
from como_jax.runtime_torch.policy import Policy  # noqa: E402
from como_jax.spec.exported import ExportedPolicy, read_description  # noqa: E402
from como_jax.spec.interface import History  # noqa: E402
from como_jax.spec.towers import TextConfig  # noqa: E402
from como_jax.training.run import Run  # noqa: E402
from tests.everyday import mostly_slow  # noqa: E402
from tests.runtime_torch.stored_policies import CLIP, T5, store  # noqa: E402

# Without anything that is drawn.
THINKING = {"model.generate_latents": True, "model.latent_queries": 2, "model.latent_dim": 3}
WRITING = {"model.action_head": "regression", "data.chunk": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("diffusion", CLIP | {"text.prompt": "push {}"}),
    "t5": ("autoregressive", T5 | THINKING | {"text.prompt": "push the {}"}),
    "gated t5": ("vla", T5 | WRITING | {"text.prompt": "push the {}", "text.activation": "gated-gelu_new"}),
}
# Without words, with some that are unknown, and as long as one may be with what is around it.
TEXTS = ("", "the red moon", "blue " * 8 + "cube")


class Stored(NamedTuple):
    """A policy as files, and its run."""

    folder: Path
    run: Run

    @property
    def text(self) -> TextConfig:
        """Of config.json."""
        return read_description(self.folder, ExportedPolicy)[0].observation.text


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stored]:
    """Writes a variant, each only once; not to be changed."""

    @functools.cache
    def write(variant: str) -> Stored:
        folder = tmp_path_factory.mktemp("stored")
        return Stored(folder, store(*VARIANTS[variant], folder)[0])

    return write


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, "clip", "t5"))
def test_instructions_are_read_as_in_training(stored: Callable[[str], Stored], variant: str) -> None:
    folder, run = stored(variant)
    read, reader = make_reader(stored(variant).text, folder), InstructionReader.make(run.config.text, folder)
    rows = np.stack([read(text) for text in TEXTS])
    np.testing.assert_array_equal(rows, reader(TEXTS), strict=True)
    assert rows[-1].all()
    with pytest.raises(InputError, match="has 13 tokens, more than the 12"):
        read(f"{TEXTS[-1]} cube")
    with pytest.raises(ConfigError, match="has 13 tokens, more than the 12"):
        reader([f"{TEXTS[-1]} cube"])

    with jax.default_matmul_precision("highest"):
        features = jax.jit(lambda params, rows: run.model.bind(params).observation.text.read(rows))(run.params, rows)
    wanted = {name: np.asarray(value) for name, value in features._asdict().items()}
    exact, fast = (
        Policy.from_pretrained(folder, robot="arm", dtype=dtype).module.observation.text
        for dtype in (torch.float32, torch.bfloat16)
    )
    found, rounded = exact(torch.from_numpy(rows)), fast(torch.from_numpy(rows))
    np.testing.assert_array_equal(found.mask, wanted["mask"])
    for name in ("tokens", "pooled"):
        assert relative_error(getattr(found, name).numpy(), wanted[name]) < 1e-5
        assert getattr(rounded, name).dtype == torch.bfloat16
        assert 1e-4 < relative_error(getattr(rounded, name).float().numpy(), wanted[name]) < 0.1
    # As in training.
    kept = {name for name, value in fast.named_parameters() if value.dtype == torch.float32}
    assert kept == {name for name in dict(exact.named_parameters()) if "norm" in name or "relative" in name}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ("t5", "gated t5"))
def test_a_whole_chunk_compiles_to_one_graph(stored: Callable[[str], Stored], variant: str) -> None:
    policy = Policy.from_pretrained(stored(variant).folder, robot="arm")
    instants = policy.config.observation.instants
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    states = np.zeros((instants, policy.spec.state_size), np.float32)
    scene = History([dict.fromkeys(policy.spec.cameras, image)] * instants, states, "the red cube")
    with torch.inference_mode():
        arguments = policy.observe([scene]), GivenNoise(())
        compiled = torch.compile(policy.module.sample_actions, fullgraph=True, backend="eager")(*arguments)
        torch.testing.assert_close(compiled, policy.module.sample_actions(*arguments))


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "tokenizer_file is missing, which the tower clip needs": ("clip", {"tokenizer_file": ""}),
    "positions 11 must be at least max_length, 12": ("clip", {"positions": 11}),
    "activation 'gated-relu' must be one of relu, silu": ("clip", {"activation": "gated-relu"}),
    "mlp_width is missing, which the tower t5 needs": ("t5", {"mlp_width": 0}),
    "relative_buckets 3 must be at least 4": ("t5", {"relative_buckets": 3}),
    "a quarter of them less than relative_distance, 2": ("t5", {"relative_distance": 2}),
}


def test_towers_and_tokenizers_that_do_not_fit_are_refused(stored: Callable[[str], Stored], tmp_path: Path) -> None:
    for message, (variant, changes) in BAD.items():
        content = json.loads((stored(variant).folder / "config.json").read_text())
        content["observation"]["text"] |= changes
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ModelFileError, match=message):
            read_description(tmp_path, ExportedPolicy)
    text = stored("clip").text
    with pytest.raises(ModelFileError, match="has 8 tokens, and the policy knows 7"):
        make_reader(dataclasses.replace(text, vocabulary_size=7), stored("clip").folder)
    write_tokenizer(tmp_path / text.tokenizer_file, "t5")
    with pytest.raises(ModelFileError, match=r"does not put <\|startoftext\|> first"):
        make_reader(text, tmp_path)
