"""Labels from end to end: what they are, what stands beside them, and that any number of hosts makes the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from como_jax.data.clips import ClipConfig
from como_jax.data.mixture import Mixture, MixtureEntry
from como_jax.data.motion_data import ClipFiller
from como_jax.data.reader import BatchReader
from como_jax.data.sources import EpisodeSource, load_normalizer
from como_jax.errors import ConfigError, DatasetError, OutputError, RunError
from como_jax.labelling.shards import list_shards
from como_jax.labelling.streaming import single_frames
from como_jax.training import sharding
from como_jax.training.run import load_run
from configs import pretrain_como, pretrain_mae
from experiments.extract_labels import extract_labels
from experiments.pretrain import pretrain
from tests.conftest import REPOSITORY
from tests.everyday import mostly_slow

GAP = 3


@pytest.fixture(scope="module")
def labelled(
    smoke_run: Callable[[str], Path], tabletop_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The demonstrations, labelled by a run of a recipe with default settings."""
    made: dict[str, Path] = {}

    def label(recipe: str) -> Path:
        if recipe not in made:
            made[recipe] = tmp_path_factory.mktemp("labelled") / recipe
            extract_labels(smoke_run(recipe), tabletop_dataset, made[recipe])
        return made[recipe]

    return label


def pairs(dataset: Path, source: EpisodeSource, records: np.ndarray) -> np.ndarray:
    """Frames `[B, 2, H, W, 3]` of some steps and those a gap later."""
    mixture = Mixture.open([MixtureEntry(str(dataset))], source.split, ClipConfig(0.3))
    reader = BatchReader(ClipFiller(mixture), 32)
    return np.stack(
        [reader.decode(single_frames(records * 0, records + shift))[0][:, 0, 0] for shift in (0, GAP)], axis=1
    )


@pytest.mark.parametrize("recipe", mostly_slow(["como", "laq", "discrete"], "como"))
@pytest.mark.parametrize("split", ["train", "val"])
def test_every_step_has_the_motion_to_the_step_a_gap_later_or_is_masked(
    recipe: str, split: str, labelled: Callable[[str], Path], smoke_run: Callable[[str], Path]
) -> None:
    source = EpisodeSource(labelled(recipe), split)
    for start, length in zip(source.start, source.length, strict=True):
        rows = slice(start, start + length)
        assert source.latent_valid[rows].tolist() == [step + GAP < length for step in range(length)]
    run = load_run(smoke_run(recipe), sharding.make_mesh())
    chosen = np.flatnonzero(source.latent_valid)[:: max(1, source.latent_valid.sum() // 16)]
    frames = pairs(labelled(recipe), source, chosen)
    encode = jax.jit(lambda params, frames: run.model.bind(params).encode(frames))
    expected = np.asarray(encode(run.params, frames)).reshape(len(chosen), -1)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(source.latent_motion[chosen], expected, atol=1e-5)
    assert not source.latent_motion[~source.latent_valid].any()
    if recipe == "como":
        assert source.latent_codes is None
    else:
        codes = jax.jit(lambda params, frames: run.model.bind(params).codes(frames))(run.params, frames)
        np.testing.assert_array_equal(source.latent_codes[chosen], np.asarray(codes)[:, 0])
        assert np.all(source.latent_codes[~source.latent_valid] == -1)


def test_the_rest_of_the_dataset_is_as_it_was(labelled: Callable[[str], Path], tabletop_dataset: Path) -> None:
    out = labelled("como")
    for split in ("train", "val"):
        old, new = EpisodeSource(tabletop_dataset, split), EpisodeSource(out, split)
        for name in ("length", "control_rate", "motion", "action", "state", "episode_id", "instruction"):
            np.testing.assert_array_equal(getattr(new, name), getattr(old, name))
        assert new.read_jpegs(range(len(new))) == old.read_jpegs(range(len(old)))
    for name in ("dataset_info.json", "features.json", "metadata.json"):
        assert (out / name).read_bytes() == (tabletop_dataset / name).read_bytes()


def test_the_labels_say_where_they_come_from(
    labelled: Callable[[str], Path], smoke_run: Callable[[str], Path], tabletop_dataset: Path
) -> None:
    labels = json.loads((labelled("como") / "labels.json").read_text())
    assert labels["run"] == str(smoke_run("como")) and labels["step"] == 1 and labels["family"] == "como"
    assert labels["config"] == json.loads((smoke_run("como") / "config.json").read_text())
    assert labels["settings"] == {"gap_seconds": 0.3, "camera": "", "fit": "crop", "batch_size": 64}
    assert labels["dataset"] == str(tabletop_dataset) and labels["versions"]["jax"] == jax.__version__
    assert labels["parameters"] != json.loads((labelled("discrete") / "labels.json").read_text())["parameters"]
    assert datetime.fromisoformat(labels["date"]).tzinfo is not None


def test_statistics_of_the_latent_normalize_it(labelled: Callable[[str], Path]) -> None:
    out = labelled("como")
    source = EpisodeSource(out, "train")
    latent = source.latent_motion[source.latent_valid]
    scaled = load_normalizer(out, "latent_motion", "mean_std")(latent)
    varies = latent.std(axis=0) > 1e-5
    assert varies.any()
    np.testing.assert_allclose(scaled.mean(axis=0)[varies], 0.0, atol=1e-3)
    np.testing.assert_allclose(scaled.std(axis=0)[varies], 1.0, atol=1e-3)
    scaled = load_normalizer(out, "latent_motion", "min_max")(latent)
    assert np.abs(scaled).max() <= 1.0 + 1e-4
    statistics = json.loads((out / "statistics.json").read_text())["latent_motion"]
    assert statistics["count"] == len(latent)
    np.testing.assert_allclose(statistics["q99"], np.quantile(latent, 0.99, axis=0), atol=1e-5)
    assert load_normalizer(out, "action", "quantile").size == 4


@pytest.mark.parametrize("recipe", mostly_slow(["como", "laq"], "como"))
def test_the_flat_table_has_a_row_a_step(recipe: str, labelled: Callable[[str], Path]) -> None:
    frame = pq.read_table(labelled(recipe) / "latents.parquet")
    row = 0
    for split in ("train", "val"):
        source = EpisodeSource(labelled(recipe), split)
        part = frame.slice(row, len(source))
        row += len(source)
        assert set(part["split"].to_pylist()) == {split}
        assert part["episode_id"].to_pylist() == list(np.repeat(source.episode_id, source.length))
        assert part["step_index"].to_pylist() == [step for length in source.length for step in range(length)]
        np.testing.assert_array_equal(part["latent_valid"].to_numpy(), source.latent_valid)
        np.testing.assert_array_equal(np.stack(part["latent_motion"].to_numpy()), source.latent_motion)
        assert ("latent_codes" in part.column_names) == (recipe == "laq")
        if recipe == "laq":
            np.testing.assert_array_equal(np.stack(part["latent_codes"].to_numpy()), source.latent_codes)
    assert row == len(frame)


def test_the_report_counts_and_gauges(labelled: Callable[[str], Path]) -> None:
    out = labelled("como")
    report = json.loads((out / "labelling_report.json").read_text())
    sources = [EpisodeSource(out, split) for split in ("train", "val")]
    assert report["episodes"] == 24 and report["unreadable"] == []
    assert report["steps"] == sum(map(len, sources))
    assert report["labelled"] == report["drift"]["count"] == sum(source.latent_valid.sum() for source in sources)
    assert report["drift"]["verdict"] in ("like the training data", "too few to tell")
    assert (out / "drift.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_trains_from_a_labelled_dataset(labelled: Callable[[str], Path], tmp_path: Path) -> None:
    config = pretrain_como.get_config("smoke")
    config.update_from_flattened_dict({"data.mixture": str(labelled("como")), "train.stop_after": 1})
    assert int(pretrain(config, tmp_path / "run").step) == 1


def test_a_labelling_without_its_training_data_says_so_in_the_report(
    smoke_run: Callable[[str], Path], tabletop_dataset: Path, tmp_path: Path
) -> None:
    shutil.copytree(smoke_run("como"), tmp_path / "run")
    for statistics in (tmp_path / "run").glob("latent_statistics*"):
        statistics.unlink()
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(str(tabletop_dataset), "/gone/away"))
    report = extract_labels(tmp_path / "run", tabletop_dataset, tmp_path / "out")
    assert "/gone/away is not a dataset directory" in report["drift"]["missing"]
    assert report["labelled"] > 0 and EpisodeSource(tmp_path / "out", "train").latent_valid.any()
    assert not (tmp_path / "out" / "drift.png").exists()


def test_what_is_not_there_or_does_not_fit_is_refused(
    smoke_run: Callable[[str], Path], tabletop_dataset: Path, labelled: Callable[[str], Path], tmp_path: Path
) -> None:
    run, out = smoke_run("como"), tmp_path / "out"
    with pytest.raises(RunError, match="nothing holds no run"):
        extract_labels(tmp_path / "nothing", tabletop_dataset, out)
    with pytest.raises(DatasetError, match="/nowhere holds no dataset"):
        extract_labels(run, "/nowhere", out)
    with pytest.raises(ConfigError, match="--gap_seconds 0.0 and --batch_size 64 must be positive"):
        extract_labels(run, tabletop_dataset, out, gap_seconds=0.0)
    with pytest.raises(ConfigError, match="must be positive"):
        extract_labels(run, tabletop_dataset, out, batch_size=0)
    with pytest.raises(OutputError, match="exists already; `overwrite` replaces it"):
        extract_labels(run, tabletop_dataset, labelled("como"))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write to"):
        extract_labels(run, tabletop_dataset, tmp_path / "file" / "out")
    assert not out.exists()


def test_a_run_without_latent_motion_is_refused_by_name(tabletop_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(pretrain_mae.get_config("smoke").to_json_best_effort())
    with pytest.raises(RunError, match="run of family 'mae', which has no latent motion; take one of como, laq"):
        extract_labels(tmp_path, tabletop_dataset, tmp_path / "out")


def start(*flags: str, devices: int = 1) -> subprocess.Popen[str]:
    """Starts the command in a process of its own."""
    command = [sys.executable, "-m", "experiments.extract_labels", *flags]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, start_new_session=True, **pipes)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    """What a process says until it ends as it should."""
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        process.kill()
    assert process.returncode == status, output
    return output


def contents(out: Path) -> dict[str, bytes]:
    """All files, but for the date of the labels."""
    found = {path.name: path.read_bytes() for path in out.iterdir()}
    labels = json.loads(found["labels.json"])
    del labels["date"]
    return {**found, "labels.json": json.dumps(labels).encode()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data=d", "--out=o"], "--workdir must"),
        (["--workdir=/nowhere", "--data=d", "--out=o"], "--workdir /nowhere holds no run"),
    ],
)
def test_a_mistake_in_the_command_is_one_line_and_status_2(
    refused: Callable[..., str], flags: list[str], message: str
) -> None:
    written = refused("experiments.extract_labels", *flags)
    assert message in written and "Traceback" not in written


@pytest.mark.slow
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(
    smoke_run: Callable[[str], Path], tabletop_dataset: Path, tmp_path: Path
) -> None:
    flags = [f"--workdir={smoke_run('como')}", f"--data={tabletop_dataset}", "--batch_size=8"]
    # The first finds nothing compiled, and takes longer.
    finish(start(*flags, f"--out={tmp_path / 'first'}"))
    begin = time.monotonic()
    finish(start(*flags, f"--out={tmp_path / 'whole'}"))
    duration, draw = time.monotonic() - begin, random.Random(0)
    out, staging = tmp_path / "out", tmp_path / "out.partial"
    num_shards = len(list_shards(epath.Path(tabletop_dataset)))
    kept: dict[str, tuple[int, int]] = {}
    for soon_after_a_shard in (True, False):
        process = start(*flags, f"--out={out}")
        if soon_after_a_shard:
            wait_for_shards(staging, min(len(list(staging.glob("done/*.json"))) + 1, num_shards), process)
        time.sleep(draw.uniform(0.0, 0.01 if soon_after_a_shard else 0.4 * duration))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists(), "it was to be killed before its end"
        found = identities(staging / "parts")
        assert {name: found[name] for name in kept} == kept
        done = {path.stem for path in staging.glob("done/*.json")}
        kept = {name: each for name, each in found.items() if name[9:-8] in done}
    assert kept
    finish(start(*flags, f"--out={out}"))
    assert contents(out) == contents(tmp_path / "whole") == contents(tmp_path / "first")


def wait_for_shards(staging: Path, count: int, process: subprocess.Popen[str]) -> None:
    while len(list(staging.glob("done/*.json"))) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """What would change if a file were written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*")}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def on_two_hosts(*flags: str) -> list[subprocess.Popen[str]]:
    """Starts a job of two processes with four devices each."""
    job = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    return [start(*flags, *job, f"--process_id={number}", devices=4) for number in range(2)]


@pytest.mark.slow
def test_two_hosts_label_like_one(smoke_run: Callable[[str], Path], tabletop_dataset: Path, tmp_path: Path) -> None:
    flags = [f"--workdir={smoke_run('laq')}", f"--data={tabletop_dataset}"]
    finish(start(*flags, f"--out={tmp_path / 'one'}"))
    outputs = [finish(process) for process in on_two_hosts(*flags, f"--out={tmp_path / 'two'}")]
    assert "steps of 24 episodes have a latent motion" in outputs[0] and "have a latent" not in outputs[1]
    one, two = (pq.read_table(tmp_path / name / "latents.parquet") for name in ("one", "two"))
    same = [name for name in one.column_names if name != "latent_motion"]
    assert one.column_names == two.column_names and one.select(same).equals(two.select(same))
    np.testing.assert_allclose(*(flat(table["latent_motion"]) for table in (one, two)), atol=1e-5)
    reports = [json.loads((tmp_path / name / "labelling_report.json").read_text()) for name in ("one", "two")]
    drifts = [report.pop("drift") for report in reports]
    assert reports[0] == reports[1]
    assert drifts[0]["mean_shift"] == pytest.approx(drifts[1]["mean_shift"], abs=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def flat(column: pa.ChunkedArray) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy()


@pytest.mark.slow
def test_all_hosts_end_when_the_first_cannot_write(
    smoke_run: Callable[[str], Path], tabletop_dataset: Path, labelled: Callable[[str], Path]
) -> None:
    flags = [f"--workdir={smoke_run('como')}", f"--data={tabletop_dataset}", f"--out={labelled('como')}"]
    processes = on_two_hosts(*flags)
    assert "exists already; --overwrite replaces it" in finish(processes[0], status=2)
    assert "host 0 has failed" in finish(processes[1], status=2)
