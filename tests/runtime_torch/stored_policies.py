"""Small policies as files, and variants of them whose instructions are read by towers with files of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from como_jax.data.instructions import write_embeddings
from como_jax.export.pytorch.contents import flatten_params
from como_jax.export.pytorch.export import write_policy
from como_jax.spec.exported import ExportedPolicy
from como_jax.spec.interface import PolicySpec
from como_jax.training.run import Run
from como_jax.weights.policies import describe_policy, not_exported, policy_table
from tests.data.tokenizer_files import ENDS, write_tokenizer
from tests.runtime_torch.small_policies import make_policy
from tests.runtime_torch.small_runs import read_exported

TEXTS = ("push", "go up")
EMBEDDINGS = {"text.tower": "embedding", "text.embedding_size": 5}
SIZES = {"text.vocabulary_size": 11, "text.mlp_width": 20, "text.norm_epsilon": 1e-5}
PUBLIC = {**SIZES, "text.max_length": 12, "text.pool": 1}
CLIP = {"text.tower": "clip", "text.activation": "quick_gelu", "text.positions": 14, **PUBLIC}
DISTANCES = {"text.relative_buckets": 8, "text.relative_distance": 10}
T5 = {"text.tower": "t5", "text.activation": "relu", "text.head_size": 5, **DISTANCES, **PUBLIC}


def store(family: str, changes: dict[str, Any], folder: Path) -> tuple[Run, PolicySpec]:
    """Writes a small policy, and asserts that it is read back as it was."""
    run, spec = make_policy(family, changes)
    workdir, text = folder / "run", run.config.text
    workdir.mkdir()
    run = run._replace(workdir=epath.Path(workdir))
    if text.tower in ENDS:
        text.tokenizer_file = str(write_tokenizer(workdir / "tokens.json", text.tower))
    if text.tower == "embedding":
        write_embeddings(workdir, {known: np.full(5, len(known), np.float32) for known in TEXTS})
    described = describe_policy(run.config, spec)
    write_policy(run, described, epath.Path(folder))
    params = flatten_params(run.params)
    kept = {path: value for path, value in params.items() if path.split("/")[0] not in not_exported(described)}
    read_description, read = read_exported(folder, ExportedPolicy, policy_table)
    assert read.keys() == kept.keys()
    assert all(np.array_equal(read[path], value) for path, value in kept.items())
    assert read_description.to_json() == described.to_json()
    return run, spec
