"""Conversions that are stopped, killed or run twice, and go on."""

import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from etils import epath
from fake_builder import FakeBuilder, FakeSettings

from como_jax.convert import report
from como_jax.errors import OutputError
from como_jax.staging import Staging

REPOSITORY = Path(__file__).resolve().parents[2]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """What would change if a file were written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.fixture
def stopped(tmp_path) -> tuple[Path, FakeSettings]:
    """A conversion of five shards that was stopped in the third, and the settings to go on with."""
    stop = tmp_path / "stop"
    stop.touch()
    behaviours = ("good",) * 9 + ("stops",) + ("good",) * 10
    settings = FakeSettings(behaviours=behaviours, stop_file=str(stop), validation_fraction=0)
    with pytest.raises(KeyboardInterrupt) as error:
        FakeBuilder(tmp_path / "out", settings).convert()
    assert error.value.__notes__ == [
        f"2 of 5 shards are finished and kept in {tmp_path}/out.partial; the same command goes on from there"
    ]
    stop.unlink()
    return tmp_path / "out", settings


def test_a_stopped_conversion_goes_on_and_gives_the_same_bytes(stopped, tmp_path):
    out, settings = stopped
    staging = tmp_path / "out.partial"
    before = identities(staging / "dataset")
    assert sorted(before) == ["out-train.array_record-00000-of-00005", "out-train.array_record-00001-of-00005"]
    assert [path.name for path in sorted((staging / "parts").iterdir())] == [
        "episodes-train-00000-of-00005.parquet",
        "episodes-train-00001-of-00005.parquet",
    ]
    (staging / "dataset" / ".out-train.array_record-00002-of-00005.partial-01234567").write_bytes(b"half")
    (staging / "done" / ".train-00002-of-00005.json.partial-01234567").write_bytes(b"half")
    FakeBuilder(out, settings).convert()
    assert not staging.exists()
    after = identities(out)
    assert {name: after[name] for name in before} == before
    FakeBuilder(tmp_path / "other" / "out", settings).convert()
    assert contents(out) == contents(tmp_path / "other" / "out")


def test_killed_while_the_dataset_is_described(tmp_path, monkeypatch):
    settings = FakeSettings()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(report, "write_summary", interrupt)
        FakeBuilder(tmp_path / "out", settings).convert()
    assert (tmp_path / "out.partial" / "dataset" / "dataset_info.json").exists()
    with pytest.raises(OutputError, match="name: out, now other"):
        FakeBuilder(tmp_path / "out", settings, name="other").convert()
    FakeBuilder(tmp_path / "out", settings).convert()
    FakeBuilder(tmp_path / "other" / "out", settings).convert()
    assert contents(tmp_path / "out") == contents(tmp_path / "other" / "out")


def test_a_shard_whose_records_are_cut_short_is_written_again(stopped, tmp_path):
    out, settings = stopped
    records = tmp_path / "out.partial" / "dataset" / "out-train.array_record-00001-of-00005"
    records.write_bytes(records.read_bytes()[:-1])
    FakeBuilder(out, settings).convert()
    FakeBuilder(tmp_path / "other" / "out", settings).convert()
    assert contents(out) == contents(tmp_path / "other" / "out")


def test_other_settings_do_not_mix_with_what_is_there(stopped, check_dataset):
    out, settings = stopped
    other = FakeSettings(behaviours=settings.behaviours[:-1], stop_file=settings.stop_file, image_size=128)
    with pytest.raises(OutputError) as error:
        FakeBuilder(out, other).convert()
    message = str(error.value)
    assert message.startswith(f"{out}.partial holds an unfinished conversion with other settings or sources (")
    assert "image_size: 256, now 128" in message
    assert "validation_fraction: 0, now 0.1" in message
    assert "number of sources: 20, now 19" in message
    assert message.endswith("); `restart` discards it")
    FakeBuilder(out, other).convert(restart=True)
    assert sum(map(len, check_dataset(out).values())) == 38
    assert not out.with_name("out.partial").exists()


def test_two_conversions_at_once_are_refused(tmp_path):
    with (
        Staging(epath.Path(tmp_path / "out"), "conversion").locked(),
        pytest.raises(OutputError, match=f"another conversion into .*out is running \\(process {os.getpid()} on "),
    ):
        FakeBuilder(tmp_path / "out", FakeSettings()).convert()
    # The lock of a process that is gone is nobody's.
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "lock").write_text("process 1 on elsewhere\n")
    FakeBuilder(tmp_path / "out", FakeSettings()).convert()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_killed_while_an_older_dataset_is_replaced(tmp_path, monkeypatch, check_dataset):
    out = tmp_path / "out"
    FakeBuilder(out, FakeSettings(behaviours=("good",) * 2)).convert()
    new = FakeSettings(behaviours=("good",) * 3)
    for name, count in (("dataset", 4), ("tidy", 6)):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            builder = FakeBuilder(out, new)
            if name == "tidy":
                patch.setattr(Staging, "tidy", interrupt)
            else:
                # The older dataset is out of the way, and then the new one cannot be renamed.
                patch.setattr(type(builder.staging.dataset), "rename", rename_once(builder.staging.dataset))
            builder.convert(overwrite=True)
        if name == "dataset":
            assert not out.exists()
            assert sum(map(len, check_dataset(out.with_name("out.partial") / "replaced").values())) == count
        else:
            assert sum(map(len, check_dataset(out).values())) == count
    report = FakeBuilder(out, new).convert(overwrite=True)
    assert report["sources"]["found"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def interrupt(*unused: object) -> None:
    raise KeyboardInterrupt


def rename_once(dataset: epath.Path):
    """`rename` of paths, which fails for one of them."""
    original = type(dataset).rename
    return lambda path, target: interrupt() if path == dataset else original(path, target)


def test_an_older_dataset_comes_back_when_the_new_one_is_given_up(tmp_path, monkeypatch, check_dataset):
    out = tmp_path / "out"
    FakeBuilder(out, FakeSettings(behaviours=("good",) * 2)).convert()
    builder = FakeBuilder(out, FakeSettings(behaviours=("good",) * 3))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(builder.staging.dataset), "rename", rename_once(builder.staging.dataset))
        builder.convert(overwrite=True)
    with pytest.raises(OutputError, match="exists already"):
        FakeBuilder(out, FakeSettings(behaviours=("good",) * 5)).convert(restart=True)
    assert sum(map(len, check_dataset(out).values())) == 4


def build(out: Path, *flags: str, episodes: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "tools.datasets.build", "tabletop", f"--out={out}", f"--episodes={episodes}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Tests that run in the background of a shell ignore Ctrl-C, and so would what they start.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([*command, *flags], cwd=REPOSITORY, start_new_session=True, preexec_fn=heed, **pipes)


def wait_for_shards(out: Path, count: int, process: subprocess.Popen) -> None:
    done = out.with_name(f"{out.name}.partial") / "done"
    while len(list(done.glob("*.json"))) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


def wait_for_end_of_group(process: subprocess.Popen) -> None:
    """Fails unless all processes that a killed one has started end soon."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("processes were left behind")


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_says_how_to_go_on(tmp_path):
    process = build(tmp_path / "out", "--processes=2", episodes=400)
    wait_for_shards(tmp_path / "out", 1, process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("stopped; ")
    assert errors.splitlines()[-1].endswith("; the same command goes on from there")
    assert "Traceback" not in errors
    wait_for_end_of_group(process)


@pytest.mark.slow
def test_kill_at_a_random_moment_then_resume(tmp_path):
    draw = random.Random(0)
    out, staging = tmp_path / "out", tmp_path / "out.partial"
    process = build(out, "--processes=2", episodes=160)
    wait_for_shards(out, draw.randint(2, 6), process)
    time.sleep(draw.uniform(0, 0.1))
    process.kill()
    process.communicate()
    wait_for_end_of_group(process)
    found = identities(staging / "dataset")
    parts = [path.stem for path in (staging / "done").glob("train-*.json")]
    assert 0 < len(parts) < 36
    kept = {name: found[name] for name in found for part in parts if part[6:] in name and "train" in name}
    process = build(out, "--processes=2", episodes=160)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    found = identities(out)
    assert {name: found[name] for name in kept} == kept
    process = build(tmp_path / "other" / "out", "--processes=1", episodes=160)
    assert process.wait(timeout=120) == 0
    assert contents(out) == contents(tmp_path / "other" / "out")
    assert not staging.exists()
