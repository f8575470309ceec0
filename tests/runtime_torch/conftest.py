"""One thread for PyTorch, which shares the cores with JAX, and a small exported model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch computes in one thread; tests are skipped where it is missing."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights and config.json of a small CoMo with codes; not to be changed."""
    from tests.runtime_torch.small_runs import make_run
    from tools.export_torch.export import write_model

    folder = tmp_path_factory.mktemp("exported")
    write_model(make_run("como", {"model.bottleneck.kind": "vq", "model.bottleneck.codebook_size": 11}), folder)
    return folder
