"""One thread for PyTorch, which shares the cores with JAX, and a small exported model."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def one_thread(torch_in_one_thread: None) -> None:
    """For all tests here, which are skipped where PyTorch is missing."""


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and config.json of a small CoMo with codes; not to be changed."""
    from como_jax.export.pytorch.export import write_model
    from tests.runtime_torch.small_runs import make_run

    folder = tmp_path_factory.mktemp("exported")
    write_model(make_run("como", {"model.bottleneck.kind": "vq", "model.bottleneck.codebook_size": 11}), folder)
    return folder
