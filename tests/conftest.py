"""Fixtures for all tests."""

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest
from absl import flags

from como_jax.convert.catalog import BUILDERS, make_settings
from como_jax.labelling.labelling import DatasetLabeller, LabelSettings
from como_jax.motion.como import Como
from como_jax.nn.model_def import ModelDef
from como_jax.spec.motion import MotionConfig
from como_jax.spec.towers import VitConfig
from como_jax.training import sharding
from como_jax.training.run import load_run
from experiments.pretrain import pretrain
from experiments.train_policy import train_policy
from tests.policies.smoke_policies import PolicyRun, smoke

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # Programs that compile fast and run slowly, and one cache of them, here and in the processes that tests start. XLA
    # reads its flags with the first computation; the new emitters of fused kernels take twice the time to compile.
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    settings = {
        "jax_platforms": "cpu",
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(config.cache.mkdir("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)
    # Eight virtual devices, here alone. Of its own accord Orbax lets each save a part of every array, and compiles
    # hundreds of programs to cut them.
    jax.config.update("jax_num_cpu_devices", 8)
    ocp.type_handlers.get_type_handler(jax.Array)._use_replica_parallel = False
    # Grain's worker processes read absl flags, which nobody parses under pytest.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="session")
def torch_in_one_thread() -> Iterator[None]:
    """PyTorch computes in one thread, since it shares the cores with JAX; tests are skipped where it is missing."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sample_data() -> Path:
    """The folder of real recordings; tests that need it are skipped where it is missing."""
    folder = Path(os.environ.get("COMO_SAMPLE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no sample data in {folder}; set COMO_SAMPLE_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def make_como() -> Callable[..., ModelDef]:
    """Makes the smallest CoMo for 16-pixel pictures; keyword arguments are fields of `MotionConfig`."""

    def make(remat: str = "none", **changes: Any) -> ModelDef:
        sizes = {"idm_width": 16, "idm_depth": 2, "idm_heads": 2, "fdm_width": 16, "fdm_depth": 1, "fdm_heads": 2}
        sizes |= {"num_queries": 2, "latent_dim": 3, "fdm_patch_size": 8}
        config = MotionConfig(**{"perceptual_weight": 0.0, **sizes, **changes})
        vit = VitConfig(image_size=16, patch_size=8, width=16, depth=2, num_heads=2)
        return ModelDef.create(lambda rngs: Como(vit, config, remat=remat, rngs=rngs))

    return make


@pytest.fixture(scope="session")
def como_params(make_como: Callable[..., ModelDef]) -> dict[str, Any]:
    """Random parameters of a CoMo of `make_como`, which fit all its variants of equal sizes without more heads."""
    return jax.jit(make_como().init)(jax.random.key(0))


@pytest.fixture(scope="session")
def tabletop_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-four demonstrations of the embedded environment, 64 px, with actions."""
    directory = tmp_path_factory.mktemp("datasets") / "tabletop"
    BUILDERS["tabletop"](directory, make_settings("tabletop", {"episodes": 24}), None).convert()
    return directory


@pytest.fixture(scope="session")
def smoke_run(tabletop_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains a recipe of `configs` by one step on the demonstrations, and returns its directory; each only once."""

    @functools.cache
    def train(recipe: str) -> Path:
        config = importlib.import_module(f"configs.pretrain_{recipe}").get_config("smoke")
        mixture = {"data.mixture": str(tabletop_dataset), "data.gap_seconds": 0.3}
        config.update_from_flattened_dict({**mixture, "train.stop_after": 1})
        workdir = tmp_path_factory.mktemp("runs") / recipe
        pretrain(config, workdir)
        return workdir

    return train


@pytest.fixture(scope="session")
def robot_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six demonstrations of the embedded environment, 64 px, with actions and states."""
    directory = tmp_path_factory.mktemp("datasets") / "robot"
    BUILDERS["tabletop"](directory, make_settings("tabletop", {"episodes": 6}), None).convert()
    return directory


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six other demonstrations, without actions and states."""
    directory = tmp_path_factory.mktemp("datasets") / "videos"
    settings = make_settings("tabletop", {"episodes": 6, "seed": 1, "actions": False})
    BUILDERS["tabletop"](directory, settings, None).convert()
    return directory


@pytest.fixture(scope="session")
def label_dataset(
    smoke_run: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Path, str], Path]:
    """Labels a dataset by a run of `smoke_run` and returns the labelled one, of the given name."""

    def label(recipe: str, dataset: Path, name: str) -> Path:
        run, out = load_run(smoke_run(recipe), sharding.make_mesh()), tmp_path_factory.mktemp("labelled") / name
        settings = LabelSettings(gap_seconds=0.3, batch_size=32)
        DatasetLabeller(run, dataset, out, settings, threads=2).label(progress=lambda *_: None, summarize=lambda *_: {})
        return out

    return label


@pytest.fixture(scope="session")
def labelled_videos(videos: Path, label_dataset: Callable[[str, Path, str], Path]) -> Path:
    """`videos` with continuous labels."""
    return label_dataset("como", videos, "labelled")


@pytest.fixture(scope="session")
def coded_videos(videos: Path, label_dataset: Callable[[str, Path, str], Path]) -> Path:
    """`videos` with labels that have codes."""
    return label_dataset("discrete", videos, "coded")


@pytest.fixture(scope="session")
def policy_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., PolicyRun]:
    """Trains the smoke recipe of a family of policies on some datasets, with changes by full name; each only once."""

    @functools.cache
    def train(family: str, *datasets: Path, **changes: Any) -> PolicyRun:
        workdir = tmp_path_factory.mktemp("policies") / family
        return PolicyRun(workdir, train_policy(smoke(family, *datasets, **changes), workdir))

    return train
