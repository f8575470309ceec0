"""Datasets of every kind are recognised, and the faults of their formats found."""

from __future__ import annotations

import json
import shutil

import pytest
from lerobot_files import edit_info, rows, v2_paths, write_table, write_v2, write_v3

from como_jax.convert.sources import Source
from como_jax.data.sources import EpisodeSource
from como_jax.doctor.findings import Severity
from como_jax.doctor.sources import open_view
from como_jax.doctor.sources.base import spread, spread_records
from como_jax.doctor.sources.videos import VideoHeader, check_decoder
from como_jax.errors import DatasetError


def by_name(diagnosis):
    return {finding.name: finding for finding in diagnosis.findings}


def alarming(diagnosis):
    return {finding.name for finding in diagnosis.findings if finding.severity != Severity.INFO}


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(DatasetError, match="is not a dataset that can be read; there are: a dataset made by"):
        open_view(tmp_path)
    with pytest.raises(DatasetError, match="gone is not a folder"):
        open_view(tmp_path / "gone")


def test_episodes_are_spread_over_the_dataset():
    assert spread(10, 0) == list(range(10))
    assert spread(10, 4) == [0, 2, 5, 7]
    sources = [Source("a", "train", (0, 100)), Source("b", "train", (50, 150))]
    parts = spread_records(sources, 16)
    assert sum(part.records[1] - part.records[0] for part in parts) == 16
    assert [part.records for part in parts if part.path == "a"] == [(0, 2), (25, 27), (50, 52), (75, 77)]
    assert [part.records[0] for part in parts if part.path == "b"] == [50, 75, 100, 125]
    assert spread_records(sources, 0) == sources


def test_a_healthy_conversion_has_no_warning(tabletop_dataset, diagnose):
    diagnosis = diagnose(tabletop_dataset)
    assert alarming(diagnosis) == set()
    assert diagnosis.facts["Looked at"].startswith("24 episodes, out of 24 episodes: ")
    assert len(diagnose(tabletop_dataset, limit=5).survey.episodes) == 5


def test_what_a_conversion_reports_is_passed_on(tabletop_dataset, tmp_path, diagnose):
    directory = tmp_path / "tabletop"
    shutil.copytree(tabletop_dataset, directory)
    report = json.loads((directory / "conversion_report.json").read_text())
    report["left_out"] = [{"source": "a.mp4", "reasons": ["it is damaged"]}]
    report["warnings"] = [{"message": "beware", "count": 3, "examples": []}]
    (directory / "conversion_report.json").write_text(json.dumps(report))
    (directory / "statistics.json").unlink()
    (directory / "episodes-val.parquet").unlink()
    found = by_name(diagnose(directory))
    assert "a.mp4 (it is damaged)" in found["left-out"].message
    assert "beware (3 times)" in found["conversion-warning"].message
    assert found["unreadable-report"].message == "statistics.json cannot be read: it is missing."
    assert "only the split 'train'" in found["one-split"].message


def test_statistics_of_other_data_are_an_error(tabletop_dataset, tmp_path, diagnose):
    directory = tmp_path / "tabletop"
    shutil.copytree(tabletop_dataset, directory)
    statistics = json.loads((directory / "statistics.json").read_text())
    statistics["splits"]["train"]["num_steps"] += 1
    (directory / "statistics.json").write_text(json.dumps(statistics))
    assert by_name(diagnose(directory))["stale-statistics"].severity == Severity.ERROR


def test_damaged_records_and_splits_are_errors(tabletop_dataset, tmp_path, diagnose, monkeypatch):
    directory = tmp_path / "tabletop"
    shutil.copytree(tabletop_dataset, directory)
    (directory / "episodes-val.parquet").write_bytes(b"broken")
    read = EpisodeSource.read_jpegs
    monkeypatch.setattr(
        EpisodeSource, "read_jpegs", lambda self, steps: [b""] * 6 if steps[0] == 0 else read(self, steps)
    )
    found = by_name(diagnose(directory))
    assert "split 'val' cannot be read" in found["damaged-split"].message
    assert "1 part of the dataset cannot be read" in found["unreadable"].message


def test_healthy_rlds_has_no_warning(write_rlds, diagnose):
    diagnosis = diagnose(write_rlds().parent, control_rate=5.0)
    assert diagnosis.name == "flagged 1.0.0"
    assert alarming(diagnosis) == set()


def test_faults_of_rlds_are_found(write_rlds, diagnose):
    diagnosis = diagnose(write_rlds(faulty=True))
    found = by_name(diagnosis)
    assert "all 5 episodes" in found["is-last"].message
    assert "reward is 0" in found["no-reward"].message
    # Nothing is said of the wrist, whose flag is right.
    assert found["has-flag-denied"].message.startswith("has_front, has_language are False although")
    assert "'wrist' is black in all 5" in found["black-camera"].message
    assert "3 of 3 dimensions" in found["first-action-zero"].message
    described = found["template-descriptions"].message
    assert "the dataset's own" in described and "action is described as 8 numbers and has 3" in described
    assert "2 cameras share one, 'RGB.'" in described
    assert "unknown-rate" in found
    assert alarming(diagnosis) == set(found) - {"unknown-rate"}


def test_a_part_of_rlds_is_looked_at(write_rlds, diagnose):
    diagnosis = diagnose(write_rlds(num_episodes=9, faulty=True), limit=4)
    assert len(diagnosis.survey.episodes) == 4
    assert "all 4 episodes" in by_name(diagnosis)["is-last"].message


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_lerobot_with_gaps_in_its_numbers_only(tmp_path, diagnose, write):
    diagnosis = diagnose(write(tmp_path / "data"))
    found = by_name(diagnosis)
    assert found["episode-numbers"].message.endswith("from 0: 1-2, 6.")
    # The images of this dataset are plain, its episodes short, and its actions count up from 0.
    made = {"uniform-camera", "too-short", "too-fast", "first-action-zero"}
    assert alarming(diagnosis) - made == {"episode-numbers"}
    assert diagnosis.facts["Codecs"].startswith("h264")


def test_faults_of_lerobot_are_found(tmp_path, diagnose):
    source = write_v2(tmp_path / "data")
    info = json.loads((source / "meta" / "info.json").read_text())
    features = info["features"] | {"observation.images.ghost": {"dtype": "video", "shape": [800, 1280, 3]}}
    template = "data/chunk-{episode_index:03d}/episode_{episode_index:06d}.parquet"
    edit_info(source, features=features, data_path=template, total_chunks=0, total_episodes=3, fps=20)
    columns = rows(2, 7)
    columns["timestamp"] = [step / 20 + (step > 3) for step in range(7)]
    write_table(v2_paths(source, 2)[0], columns)
    found = by_name(diagnose(source))
    assert found["camera-without-files"].message.endswith("files: observation.images.ghost.")
    assert "total_chunks is 0, and there are 2" in found["wrong-totals"].message
    assert "total_episodes" not in found["wrong-totals"].message
    assert "leads to data/chunk-001/episode_000001.parquet" in found["wrong-template"].message
    assert "videos with 10 frames" in found["other-frame-rate"].message
    assert "episode_000001, episode_000006" in found["other-clock"].message
    assert "episode_000002" in found["time-jumps"].message


def test_missing_videos_of_lerobot_are_errors(tmp_path, diagnose):
    source = write_v2(tmp_path / "data")
    v2_paths(source, 2)[1].unlink()
    found = by_name(diagnose(source))["unreadable"]
    assert found.severity == Severity.ERROR and "episode_000002" in found.message


def test_videos_of_a_camera_have_no_warning(tmp_path, write_clip, diagnose):
    for seed in range(3):
        write_clip(tmp_path / f"{seed}.mp4", seed)
    diagnosis = diagnose(tmp_path)
    assert alarming(diagnosis) == set()
    assert {"guessed-rate", "no-action", "no-language"} <= set(by_name(diagnosis))


def test_a_frame_rate_that_is_no_control_rate(tmp_path, write_clip, diagnose):
    for seed in range(3):
        write_clip(tmp_path / f"{seed}.mp4", seed, rate=30, num_frames=33, codec="mpeg4")
    (tmp_path / "texts.json").write_text(json.dumps({f"{seed}.mp4": f"task {seed}" for seed in range(4)}))
    found = by_name(diagnose(tmp_path))
    message = found["suspicious-frame-rate"].message
    assert "30 Hz" in message and "encoded all 3 videos" in message and "less than 1.1 s" in message
    assert "too-fast" in found
    assert "entries name no recording, such as '3.mp4'" in found["sidecar"].message
    known = by_name(diagnose(tmp_path, control_rate=3.0))
    assert not {"suspicious-frame-rate", "guessed-rate", "too-fast"} & set(known)


def test_damaged_videos_are_errors_and_the_others_count(tmp_path, write_clip, diagnose):
    write_clip(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"no video")
    diagnosis = diagnose(tmp_path)
    assert by_name(diagnosis)["unreadable"].severity == Severity.ERROR
    assert len(diagnosis.survey.episodes) == 1
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(DatasetError, match="no episode that can be read; b.mp4"):
        diagnose(tmp_path)


def test_the_resolution_is_that_of_the_files(tmp_path, write_clip, diagnose):
    write_clip(tmp_path / "a.mp4", size=(480, 640), num_frames=12)
    assert diagnose(tmp_path).facts["Cameras"] == "image 640x480"


def test_av1_without_a_decoder_is_an_error():
    headers = [VideoHeader("av1", 8, 8, 10.0), VideoHeader("h264", 8, 8, 10.0)]
    (missing,) = check_decoder(headers, available=["h264"])
    assert missing.severity == Severity.ERROR and "1 of 2 videos" in missing.message
    (present,) = check_decoder(headers, available=["libdav1d"])
    assert present.severity == Severity.INFO and "libdav1d" in present.message
    assert check_decoder(headers[1:]) == []


def test_the_source_is_left_as_it_is(write_rlds, diagnose):
    directory = write_rlds()
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    diagnose(directory)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
