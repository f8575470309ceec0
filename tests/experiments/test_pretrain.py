"""Pretraining runs from end to end: resume, kill, refusal of what does not fit, images."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import chex
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from como_jax.convert.catalog import BUILDERS, make_settings
from como_jax.errors import ConfigError, DatasetError, MeshError, RunError
from como_jax.motion.perceptual import load_perceptual
from configs import (
    pretrain_como,
    pretrain_discrete,
    pretrain_laom,
    pretrain_laq,
    pretrain_mae,
)
from experiments.pretrain import pretrain
from tests.conftest import REPOSITORY
from tests.motion.test_perceptual import save, torchvision_weights

# A recipe a family, those with a codebook, and those with terms of their own; the others differ in sizes and switches.
RECIPES = {
    "como": pretrain_como,
    "mae": pretrain_mae,
    "laq": pretrain_laq,
    "discrete": pretrain_discrete,
    "laom": pretrain_laom,
}


def smoke(recipe: str, dataset: Path | str, **changes: object) -> ConfigDict:
    config = RECIPES[recipe].get_config("smoke")
    config.data.mixture = str(dataset)
    config.update_from_flattened_dict(changes)
    return config


def train_metrics(workdir: Path) -> dict[int, dict[str, float]]:
    """What each step logged of its loss, by step."""
    found: dict[int, dict[str, float]] = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        values = {key: value for key, value in entry.items() if key.startswith("train/")}
        if values:
            assert entry["step"] not in found, "a step was logged twice"
            found[entry["step"]] = values
    return found


# Two families every day.
EVERYDAY = ("como", "laq")


@pytest.fixture(
    scope="module",
    params=[name if name in EVERYDAY else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES],
)
def finished(request: pytest.FixtureRequest, tabletop_dataset: Path, tmp_path_factory: pytest.TempPathFactory):
    """Recipe, workdir and last state of an uninterrupted smoke run."""
    workdir = tmp_path_factory.mktemp("runs") / request.param
    state = pretrain(smoke(request.param, tabletop_dataset), workdir)
    return request.param, workdir, state


def test_two_steps_and_two_more_equal_four(finished, tabletop_dataset: Path, tmp_path: Path):
    recipe, whole, state = finished
    # As the run was after two steps: what it wrote later is dropped.
    halves = Path(shutil.copytree(whole, tmp_path / "run"))
    shutil.rmtree(halves / "checkpoints" / "4")
    resumed = pretrain(smoke(recipe, tabletop_dataset), halves)
    assert train_metrics(halves) == train_metrics(whole)
    assert set(train_metrics(whole)) == {1, 2, 3, 4}
    chex.assert_trees_all_equal(resumed, state)


def test_a_run_leaves_images_metrics_and_a_board(finished):
    _, workdir, _ = finished
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    images = sorted((workdir / "images").glob("eval_val_*_0000004.png"))
    assert images and np.asarray(Image.open(images[0])).std() > 0
    keys = set().union(*(json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()))
    assert {"speed/pairs_per_second", "train/loss", "train/grad_norm"} <= keys


def test_a_run_reports_its_metrics_beside_their_baselines(finished):
    recipe, workdir, _ = finished
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    if recipe == "mae":
        assert last["eval_val/masked_patch_mse"] > 0
    else:
        assert {"psnr", "psnr_copy", "s_pcfc", "lp_mse", "lp_mse_mean_action"} <= {
            key.removeprefix("eval_val/") for key in last
        }
    if recipe in ("laq", "discrete"):
        assert all(values["train/perplexity"] >= 1 for values in train_metrics(workdir).values())


@pytest.mark.slow
@pytest.mark.parametrize("finished", ["mae"], indirect=True)
def test_como_starts_from_the_encoder_of_another_run(finished, tabletop_dataset: Path, tmp_path: Path):
    _, workdir, state = finished
    changes = {"encoder.init_from": str(workdir), "train.stop_after": 1}
    started = pretrain(smoke("como", tabletop_dataset, **changes), tmp_path / "run")
    chex.assert_trees_all_equal(started.frozen["encoder"], state.params["encoder"])

    with pytest.raises(RunError, match=r"encoder/.* is \(.*\) there and \(.*\) here"):
        pretrain(smoke("como", tabletop_dataset, **changes, **{"encoder.width": 16}), tmp_path / "narrow")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data.batch_size": 7}, MeshError, "batch size 7 is not divisible by 2 devices"),
        ({"mesh.data": 3}, MeshError, "does not fit 2 devices"),
        ({"data.gap_seconds": 100.0}, DatasetError, "shorter than a clip of .*Lower data.gap_seconds"),
        ({"data.camera": "wrist"}, DatasetError, "no camera 'wrist'; it has: image"),
        ({"data.mixture": "/nowhere"}, DatasetError, "/nowhere is not a dataset directory"),
        ({"data.mixture": ""}, DatasetError, "names no dataset"),
        ({"model.motion_input": "past"}, ConfigError, "model.motion_input 'past' is unknown"),
        ({"data.image_size": 40}, ConfigError, "data.image_size 40 must be a multiple of encoder.patch_size"),
        ({"train.dtype": "float8"}, ConfigError, "config.train.dtype 'float8'"),
        ({"encoder.init_from": "/nowhere"}, RunError, "/nowhere holds no run"),
        (
            {"model.perceptual_weight": 1.0},
            ConfigError,
            "name a .safetensors or .npz file in config.model.perceptual_file",
        ),
        ({"model.bottleneck.kind": "pq"}, ConfigError, "model.bottleneck.kind 'pq' must be one of none, vq"),
        ({"model.gap_weight": 1.0}, ConfigError, "set data.min_gap_fraction under 1"),
        ({"model.label_weight": 1.0, "data.labels": "torque"}, ConfigError, "data.labels 'torque'"),
        ({"model.label_weight": 1.0, "model.label_size": 9}, ConfigError, "model.label_size is 9, but the data's is 4"),
    ],
)
def test_what_does_not_fit_is_refused(tabletop_dataset: Path, tmp_path: Path, changes, error, message):
    with pytest.raises(error, match=message):
        pretrain(smoke("como", tabletop_dataset, **changes), tmp_path / "run")


@pytest.mark.parametrize("finished", ["como"], indirect=True)
def test_a_directory_of_another_config_is_refused(finished, tabletop_dataset: Path):
    recipe, workdir, _ = finished
    with pytest.raises(RunError, match=r"config.optim.learning_rate was .* and is 0.5"):
        pretrain(smoke(recipe, tabletop_dataset, **{"optim.learning_rate": 0.5}), workdir)


def test_an_unwritable_directory_is_refused(tabletop_dataset: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="`workdir` .* cannot be written"):
        pretrain(smoke("como", tabletop_dataset), tmp_path / "file" / "run")


def command(workdir: Path, dataset: Path, *more: str, recipe: str = "configs/pretrain_como.py:smoke") -> list[str]:
    flags = [f"--config={recipe}", f"--workdir={workdir}", f"--data={dataset}", *more]
    return [sys.executable, "-m", "experiments.pretrain", *flags]


@pytest.mark.slow
def test_killed_at_a_random_moment_and_restarted_equals_uninterrupted(tabletop_dataset: Path, tmp_path: Path):
    steps = 20
    flags = [
        f"--config.train.num_steps={steps}",
        "--config.train.checkpoint_every=4",
        "--config.train.evaluate_every=0",
    ]

    whole = tmp_path / "whole"
    uninterrupted = command(whole, tabletop_dataset, *flags, "--config.train.checkpoint_every=0")
    subprocess.run(uninterrupted, check=True, capture_output=True, cwd=REPOSITORY)

    killed, target = tmp_path / "killed", random.Random(0).randint(6, 12)
    process = subprocess.Popen(command(killed, tabletop_dataset, *flags), stderr=subprocess.DEVNULL, cwd=REPOSITORY)
    while process.poll() is None and last_step(killed) < target:
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < last_step(killed) < steps
    subprocess.run(command(killed, tabletop_dataset, *flags), check=True, capture_output=True, cwd=REPOSITORY)

    assert train_metrics(killed) == train_metrics(whole)


def last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.mark.slow
def test_sigterm_saves_and_exits_cleanly(tabletop_dataset: Path, tmp_path: Path):
    flags = ["--config.train.num_steps=100000", "--config.train.checkpoint_every=0", "--config.train.evaluate_every=0"]
    workdir = tmp_path / "run"
    arguments = command(workdir, tabletop_dataset, *flags)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    while last_step(workdir) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.terminate()
    _, output = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "run the same command to go on" in output
    assert [int(path.name) for path in (workdir / "checkpoints").iterdir()] == [last_step(workdir)]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.model.latent_dmi=3", "no field 'model.latent_dmi'; did you mean 'model.latent_dim'?"),
        ("--config.modle.latent_dim=3", "no field 'modle.latent_dim'; did you mean 'model.latent_dim'?"),
        ("--config.optim.lr=1.0", "no field 'optim.lr'; config.optim has .*learning_rate"),
        ("--config.model.latent_dim=many", "--config.model.latent_dim=many"),
        ("--config=configs/pretrain_como.py:tny", "Unknown variant 'tny'; choose one of base, tiny, smoke"),
        ("--wrkdir=x", "Unknown command line flag 'wrkdir'"),
        ("stray", "Unexpected argument 'stray'"),
    ],
)
def test_a_mistyped_flag_is_one_line_and_status_2(tmp_path: Path, flag: str, message: str, refused: Callable[..., str]):
    written = refused(*command(tmp_path / "run", tmp_path, flag)[2:])
    assert re.search(message, written) and written.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_training_needs_neither_tensorflow_nor_torch(tabletop_dataset: Path, tmp_path: Path):
    code = (
        # Where PyTorch is installed, tensorboardX would import it.
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch': raise ImportError('PyTorch is hidden')\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from configs import pretrain_como; from experiments.pretrain import pretrain\n"
        "config = pretrain_como.get_config('smoke'); config.data.mixture, config.train.stop_after = sys.argv[1], 1\n"
        "pretrain(config, sys.argv[2])\n"
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules"
    )
    arguments = [sys.executable, "-c", code, str(tabletop_dataset), str(tmp_path / "run")]
    subprocess.run(arguments, check=True, cwd=REPOSITORY)


@pytest.mark.slow
def test_the_package_imports_fast_and_starts_no_backend():
    code = (
        "import time; start = time.monotonic(); import como_jax; seconds = time.monotonic() - start\n"
        "import sys; assert 'jax' not in sys.modules and 'tensorflow_datasets' not in sys.modules\n"
        "import como_jax.motion.como, como_jax.data.pipeline\n"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.mark.slow
def test_the_switches_work_together(tabletop_dataset: Path, tmp_path: Path):
    changes = {
        "train.dtype": "bfloat16",
        "train.remat": "dots",
        "train.accumulation": 2,
        "data.batch_size": 16,
        "data.instants": 3,
        "data.gap_seconds": 0.3,
        "optim.ema_decay": 0.9,
        "encoder.frozen": False,
        "model.residual": False,
        "mesh.fsdp": 2,
        "train.stop_after": 2,
    }
    state = pretrain(smoke("como", tabletop_dataset, **changes), tmp_path / "run")
    assert not state.frozen and set(state.ema) == {"encoder", "idm", "fdm"}
    assert all(np.isfinite(value) for value in train_metrics(tmp_path / "run")[2].values())


@pytest.mark.slow
def test_all_objectives_work_together(tabletop_dataset: Path, tmp_path: Path):
    weights = ("perceptual", "feature", "flow", "gap", "label")
    changes = {
        **{f"model.{name}_weight": 0.5 for name in weights},
        "model.perceptual_space": "encoder",
        "data.min_gap_fraction": 0.5,
        "data.labels": "action,state",
        "data.labelled_fraction": 0.3,
        "model.bottleneck.kind": "kl",
        "train.accumulation": 1,
        "train.stop_after": 3,
    }
    pretrain(smoke("como", tabletop_dataset, **changes), tmp_path / "run")
    found = train_metrics(tmp_path / "run")[3]
    assert {f"train/{name}" for name in (*weights, "mse", "tcl", "kl")} <= set(found)
    assert all(np.isfinite(value) for value in found.values())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["label_size"] == 8
    resumed = pretrain(smoke("como", tabletop_dataset, **changes, **{"train.log_every": 2}), tmp_path / "run")
    assert int(resumed.step) == 3


@pytest.mark.slow
def test_the_perceptual_network_comes_from_its_file_and_is_kept_by_the_run(tabletop_dataset: Path, tmp_path: Path):
    path = save(tmp_path / "alexnet.npz", torchvision_weights("alexnet"))
    changes = {"model.perceptual_weight": 1.0, "model.perceptual_space": "alexnet", "model.perceptual_file": str(path)}
    state = pretrain(smoke("como", tabletop_dataset, **changes, **{"train.stop_after": 1}), tmp_path / "run")
    kernel = np.asarray(state.frozen["perceptual"]["conv0"]["kernel"])
    np.testing.assert_array_equal(kernel, load_perceptual(path, "alexnet")["conv0"]["kernel"])
    assert train_metrics(tmp_path / "run")[1]["train/perceptual"] > 0


@pytest.mark.slow
def test_worker_processes_resume_too(tabletop_dataset: Path, tmp_path: Path):
    changes = {"model.motion_input": "future", "model.tcl_weight": 0.0}
    for name, stops, workers in (("whole", (4,), 0), ("halves", (2, 4), 1)):
        for stop in stops:
            options = {"data.num_workers": workers, "train.stop_after": stop}
            pretrain(smoke("como", tabletop_dataset, **changes, **options), tmp_path / name)
    assert train_metrics(tmp_path / "whole") == train_metrics(tmp_path / "halves")
    assert "train/tcl" not in train_metrics(tmp_path / "whole")[4]


SAMPLES = {
    "rt1": ("video_folder", "rt1_videos", {"control_rate": 3.0}),
    "calvin": ("video_folder", "calvin_videos", {"control_rate": 30.0}),
    "bridge": ("rlds", "bridge_rlds", {}),
    "bridge_video": ("video_folder", "bridge_videos", {"control_rate": 5.0}),
    "human": ("video_folder", "human_videos", {"frame_stride": 3}),
    "g1": ("lerobot", "lerobot_g1_real", {}),
    "gr1": ("lerobot", "lerobot_gr1_sim", {}),
    "libero": ("video_folder", "libero_videos", {"control_rate": 20.0}),
    "franka": ("npz", "droid_franka_npz", {"control_rate": 15.0}),
}


@pytest.mark.slow
def test_a_mixture_of_all_sample_data_trains(sample_data: Path, tmp_path: Path):
    for name, (builder, folder, settings) in SAMPLES.items():
        settings = {"source": str(sample_data / folder), "image_size": 64, **settings}
        BUILDERS[builder](tmp_path / name, make_settings(builder, settings)).convert()
    # The two frames of the Franka are one step apart.
    own = {"bridge": "weight = 2", "franka": "gap_seconds = 0.07", "human": 'fit = "stretch"'}
    mixture = tmp_path / "mixture.toml"
    mixture.write_text(
        "".join(f'[[dataset]]\ndirectory = "{tmp_path / name}"\n{own.get(name, "")}\n' for name in SAMPLES)
    )
    pretrain(smoke("como", mixture, **{"model.tcl_weight": 0.0}), tmp_path / "run")
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    # The others have a single file, and nothing of it to hold out, or just two frames.
    held_out = [f"{i}_{name}" for i, name in enumerate(SAMPLES) if name not in ("bridge_video", "libero", "franka")]
    assert {f"eval_val/{name}/psnr" for name in held_out} <= set(last)
    assert np.isfinite(last["eval_val/2_bridge/lp_mse"]) and "eval_val/0_rt1/lp_mse" not in last
