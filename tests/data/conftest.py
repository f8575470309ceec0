"""Small datasets for policies: two robots of different cameras and sizes, and labelled videos."""

from pathlib import Path

import pytest

from tests.data.robots import add_labels, make_robot


@pytest.fixture(scope="session")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A robot with two cameras, actions of three numbers and states of two; labelled too."""
    folder = tmp_path_factory.mktemp("robots")
    return add_labels(make_robot(folder / "plain", cameras=("front", "wrist")), folder / "arm")


@pytest.fixture(scope="session")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A robot with one other camera, actions of five numbers and states of one."""
    return make_robot(tmp_path_factory.mktemp("robots") / "hand", cameras=("top",), action_size=5, state_size=1, seed=1)


@pytest.fixture(scope="session")
def plain_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos: neither actions, nor states, nor labels."""
    folder = tmp_path_factory.mktemp("videos")
    return make_robot(folder / "plain_clips", cameras=("front",), action_size=None, state_size=None, seed=2)


@pytest.fixture(scope="session")
def clips(plain_clips: Path) -> Path:
    """`plain_clips` with labels."""
    return add_labels(plain_clips, plain_clips.parent / "clips")


@pytest.fixture(scope="session")
def coded_clips(plain_clips: Path) -> Path:
    """`plain_clips` with labels that have codes."""
    return add_labels(plain_clips, plain_clips.parent / "coded_clips", parameters="discrete", codebook_size=16)
