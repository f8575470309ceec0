"""Fixtures for all tests."""

import fcntl
import functools
import hashlib
import importlib
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest
from absl import flags
from absl.testing import flagsaver
from jax.sharding import Mesh

from como_jax import cli
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
    # Eight virtual devices for the tests of meshes; see `two_devices`. By default Orbax lets each device save a part of
    # every array, and compiles hundreds of programs that cut the parts out.
    jax.config.update("jax_num_cpu_devices", 8)
    ocp.type_handlers.get_type_handler(jax.Array)._use_replica_parallel = False
    # Grain's worker processes read absl flags, which nobody parses under pytest.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow folders come first, so that no process is left with a long file at the end."""
    ranks = {
        name: rank for rank, name in enumerate(("tpu", "experiments", "training", "policies", "evaluation", "motion"))
    }
    items.sort(key=lambda item: ranks.get(item.path.parent.name, len(ranks)))


@pytest.fixture(scope="session", autouse=True)
def two_devices() -> Iterator[None]:
    """Meshes take two of the eight virtual devices, for which programs run faster, unless a test names others."""
    make_mesh, local_devices = sharding.make_mesh, jax.local_devices

    @functools.wraps(make_mesh)
    def make_small_mesh(*sizes: int, devices: Sequence[jax.Device] | None = None, **named_sizes: int) -> Mesh:
        return make_mesh(*sizes, devices=jax.devices()[:2] if devices is None else devices, **named_sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", make_small_mesh)
        patch.setattr(jax, "local_devices", lambda *args, **options: local_devices(*args, **options)[:2])
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Any]:
    """Makes a folder once for all processes of the tests: `shared(name, fill)` fills it, or waits for who does."""
    own = tmp_path_factory.getbasetemp()
    root = (own if worker_id == "master" else own.parent) / "shared"

    def make(name: str, fill: Callable[[Path], Any]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                # What a process that was stopped has left behind.
                shutil.rmtree(folder, ignore_errors=True)
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command in this process, `refused(MODULE, *FLAGS)`, which must end with status 2; returns what it says.

    Flags of modules that the command imports, such as those of another command, are named by `imports`.
    """

    def run(module: str, *arguments: str, imports: str = "") -> str:
        others = {
            flag.name: (flag, name)
            for name, found in flags.FLAGS.flags_by_module_dict().items()
            if name.startswith(("experiments.", "tools.")) and name != imports
            for flag in found
        }
        monkeypatch.setattr(cli, "_log_plainly", lambda: None)
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        for name in others:
            delattr(flags.FLAGS, name)
        try:
            with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
                runpy.run_module(module, run_name="__main__")
        finally:
            for name, (flag, owner) in others.items():
                flags.FLAGS[name] = flag
                flags.FLAGS.register_flag_by_module(owner, flag)
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


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
    """Makes the smallest CoMo for 16-pixel images; keyword arguments are fields of `MotionConfig`."""

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
def tabletop_dataset(shared: Callable[..., Path]) -> Path:
    """Twenty-four demonstrations of the embedded environment, 64 px, with actions."""
    return shared("datasets/tabletop", functools.partial(_convert, episodes=24))


@pytest.fixture(scope="session")
def robot_dataset(shared: Callable[..., Path]) -> Path:
    """Six demonstrations of the embedded environment, 64 px, with actions and states."""
    return shared("datasets/robot", functools.partial(_convert, episodes=6))


@pytest.fixture(scope="session")
def videos(shared: Callable[..., Path]) -> Path:
    """Six other demonstrations, without actions and states."""
    return shared("datasets/videos", functools.partial(_convert, episodes=6, seed=1, actions=False))


def _convert(directory: Path, **settings: Any) -> None:
    BUILDERS["tabletop"](directory, make_settings("tabletop", settings), None).convert()


@pytest.fixture(scope="session")
def smoke_run(tabletop_dataset: Path, shared: Callable[..., Path]) -> Callable[[str], Path]:
    """Trains a recipe of `configs` by one step on the demonstrations, and returns its directory; each only once."""

    def train(recipe: str) -> Path:
        config = importlib.import_module(f"configs.pretrain_{recipe}").get_config("smoke")
        mixture = {"data.mixture": str(tabletop_dataset), "data.gap_seconds": 0.3}
        config.update_from_flattened_dict({**mixture, "train.stop_after": 1})
        return shared(f"runs/{recipe}", functools.partial(pretrain, config))

    return train


@pytest.fixture(scope="session")
def label_dataset(smoke_run: Callable[[str], Path], shared: Callable[..., Path]) -> Callable[[str, Path, str], Path]:
    """Labels a dataset by a run of `smoke_run` and returns the labelled one, of the given name; each only once."""

    def label(recipe: str, dataset: Path, name: str) -> Path:
        workdir, settings = smoke_run(recipe), LabelSettings(gap_seconds=0.3, batch_size=32)

        def fill(out: Path) -> None:
            run = load_run(workdir, sharding.make_mesh())
            labeller = DatasetLabeller(run, dataset, out, settings, threads=2)
            labeller.label(progress=lambda *_: None, summarize=lambda *_: {})

        return shared(f"labelled/{_digest(recipe, dataset)}/{name}", fill)

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
def policy_run(shared: Callable[..., Path]) -> Callable[..., PolicyRun]:
    """Trains the smoke recipe of a family of policies on some datasets, with changes by full name; each only once."""

    @functools.cache
    def train(family: str, *datasets: Path, **changes: Any) -> PolicyRun:
        workdir_name, states = f"policies/{family}_{_digest(datasets, sorted(changes.items()))}", []
        workdir = shared(
            workdir_name, lambda out: states.append(train_policy(smoke(family, *datasets, **changes), out))
        )
        # Where another process has trained it: a run that is complete gives back its last state.
        return PolicyRun(workdir, states[0] if states else train_policy(smoke(family, *datasets, **changes), workdir))

    return train


def _digest(*parts: Any) -> str:
    """A short name of what is told apart by its text."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
