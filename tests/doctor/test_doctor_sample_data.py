"""Every fault that the sample recordings are known to have is found."""

from __future__ import annotations

import av
import pytest

from como_jax.doctor.findings import Severity


@pytest.fixture
def find(sample_data, diagnose):
    def run(folder: str) -> dict[str, list]:
        found: dict[str, list] = {}
        for finding in diagnose(sample_data / folder).findings:
            found.setdefault(finding.name, []).append(finding)
        return found

    return run


def test_bridge(find):
    found = find("bridge_rlds")
    (last,), (reward,), (has,) = found["is-last"], found["no-reward"], found["has-flag-denied"]
    assert "all 15 episodes" in last.message and "all 15 episodes" in reward.message
    assert has.message.startswith("has_image_0, has_image_1, has_image_2 are False")
    (black,) = found["black-camera"]
    assert "'image_3'" in black.message and "all 15" in black.message
    (first,) = found["first-action-zero"]
    assert "6 of 7 dimensions (0-5)" in first.message
    (described,) = found["template-descriptions"]
    assert "action is described as 10 numbers and has 7" in described.message


@pytest.mark.parametrize(("folder", "rate"), [("rt1_videos", "30"), ("calvin_videos", "20")])
def test_frame_rates_that_are_no_control_rates(find, folder, rate):
    (found,) = find(folder)["suspicious-frame-rate"]
    assert f"{rate} Hz" in found.message and found.severity == Severity.WARNING


def test_frame_rates_of_real_time_videos_are_not_suspected(find):
    assert "suspicious-frame-rate" not in find("bridge_videos")


@pytest.mark.slow
def test_gr1(find):
    found = find("lerobot_gr1_sim")
    assert "observation.images.egoview" in found["camera-without-files"][0].message
    assert found["wrong-totals"][0].message.endswith("total_chunks is 0, and there are 1.")
    assert {finding.message.split()[0] for finding in found["wrong-template"]} == {"data_path", "video_path"}
    assert found["constant-action"][0].message.startswith("25 of 44 action dimensions are constant")


@pytest.mark.slow
@pytest.mark.skipif("libdav1d" not in av.codecs_available, reason="this build of PyAV cannot decode AV1")
def test_g1(find):
    found = find("lerobot_g1_real")
    assert found["episode-numbers"][0].message.endswith("from 0: 10, 28-30.")
    assert "all 4 videos" in found["av1"][0].message


def test_a_folder_without_videos_is_refused(sample_data, diagnose):
    with pytest.raises(ValueError, match="is not a dataset that can be read"):
        diagnose(sample_data / "droid_franka_npz")
