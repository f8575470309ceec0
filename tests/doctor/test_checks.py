"""Every fault is found in a few made recordings, and healthy ones have none."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from como_jax.doctor.findings import Severity, name_dimensions, name_some
from como_jax.doctor.survey import PROBES, RowSample, Survey, Thresholds

NUM = 6


@pytest.fixture
def healthy(make_recording):
    return [make_recording(seed) for seed in range(NUM)]


def test_healthy_recordings_have_no_findings(healthy, check_all):
    assert check_all(healthy) == {}


def test_episodes_without_a_pair_are_too_short(make_recording, healthy, check_all):
    found = check_all([*healthy, make_recording(9, num_steps=5)])
    assert "1 of 7 episodes, such as episode 9" in found["too-short"].message
    everywhere = check_all([make_recording(seed, num_steps=5) for seed in range(3)])
    assert everywhere["too-short"].severity == Severity.ERROR
    # Five steps have a pair of neighbours, and nobody knows the gap.
    assert "too-short" not in check_all([make_recording(9, num_steps=5, control_rate=None)])


def test_tasks_that_are_over_at_once_speak_against_the_rate(make_recording, check_all):
    assert "too-fast" in check_all([make_recording(seed, control_rate=30.0) for seed in range(NUM)])
    assert "too-fast" not in check_all([make_recording(s, control_rate=30.0, instruction="") for s in range(NUM)])


def test_unknown_and_mixed_rates(make_recording, healthy, check_all):
    found = check_all([*healthy, make_recording(7, control_rate=None), make_recording(8, control_rate=5.0)])
    assert "from 5 to 10 Hz" in found["mixed-rates"].message
    assert "unknown-rate" in found


def test_still_pairs_are_counted_over_the_gap(make_recording, check_all):
    # Half a second are five steps: of 39 steps with 20 still ones, 16 of 35 pairs see no motion.
    recording = make_recording(0)
    recording.motion[1:21] = 0.0
    found = check_all([recording])["still-pairs"]
    assert found.severity == Severity.WARNING
    assert found.message.startswith("46% of the pairs")
    assert "--config.data.min_motion=0.0002" in found.advice


def test_hard_cuts_are_named_and_their_pairs_counted(make_recording, healthy, check_all):
    cut = make_recording(7)
    cut.motion[20] = 0.4
    found = check_all([*healthy, cut])["hard-cuts"]
    assert "1 of 7 episodes, 1 times in all, such as episode 7" in found.message
    # Five of 7 * 35 pairs.
    assert "2.0% of the pairs" in found.message
    assert "--config.data.max_motion=0.15" in found.advice
    assert "hard-cuts" not in check_all([*healthy, cut], Thresholds(cut=0.5))


def with_camera(healthy, make_recording, image):
    """Healthy recordings with a second camera that shows `image` all the time."""
    return [
        make_recording(seed, frames={**recording.frames, "wrist": [image] * PROBES})
        for seed, recording in enumerate(healthy)
    ]


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("black-camera", np.full((8, 8, 3), 3, np.uint8)),
        ("uniform-camera", np.full((8, 8, 3), 90, np.uint8)),
        ("frozen-camera", np.arange(192, dtype=np.uint8).reshape(8, 8, 3)),
    ],
)
def test_cameras_that_show_nothing(healthy, make_recording, check_all, name, image):
    found = check_all(with_camera(healthy, make_recording, image))
    assert set(found) == {name}
    assert "'wrist'" in found[name].message and "all 6 episodes" in found[name].message
    assert found[name].severity == Severity.WARNING
    main = check_all([make_recording(seed, frames={"main": [image] * PROBES}) for seed in range(NUM)])
    assert main[name].severity == Severity.ERROR


def test_cameras_and_sizes_that_differ(make_recording, healthy, check_all):
    large = [np.repeat(np.repeat(image, 2, 0), 2, 1) for image in healthy[0].frames["main"]]
    other = make_recording(11, frames={"main": large, "wrist": large})
    found = check_all([*healthy[1:], other])
    assert "from 64x48 to 128x96, and 1 aspect ratio." in found["mixed-resolutions"].message
    assert "is only in 1 of 6 episodes" in found["missing-camera"].message


def test_language(make_recording, check_all):
    def with_texts(*texts):
        return check_all([make_recording(seed, instruction=text) for seed, text in enumerate(texts)])

    assert "no-language" in with_texts("", " ")
    assert "Only 1 of 3" in with_texts("push", "", "")["partial-language"].message
    assert "'push'" in with_texts("push", "push")["one-instruction"].message
    assert "'Push it.' and 'push it'" in with_texts("push it", "Push it.", "pull")["spellings"].message


def test_actions_that_are_missing_or_of_several_sizes(make_recording, healthy, check_all):
    assert "no-action" in check_all([make_recording(seed, action=None) for seed in range(NUM)])
    assert "Only 6 of 7" in check_all([*healthy, make_recording(7, action=None)])["partial-action"].message
    wide = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    assert "of 3, 5 numbers" in check_all([*healthy, make_recording(7, action=wide)])["mixed-action-sizes"].message


def test_values_that_are_not_finite(make_recording, healthy, check_all):
    broken = make_recording(7)
    broken.action[3:5, 1] = np.nan
    broken.state[:] = np.inf
    found = check_all([*healthy, broken])
    assert "2 steps in all, such as episode 7" in found["action-not-finite"].message
    assert "40 steps" in found["state-not-finite"].message
    assert set(found) == {"action-not-finite", "state-not-finite"}


def test_constant_and_rarely_changing_dimensions(healthy, check_all):
    for recording in healthy:
        recording.action[:, 1] = 0.5
        recording.state[:, 0] = 2.0
    healthy[0].state[7, 0] = 2.5
    found = check_all(healthy)
    assert found["constant-action"].message == "1 of 3 action dimensions are constant: 1."
    assert found["rare-state"].message.endswith("nearly every step: 0.")
    assert set(found) == {"constant-action", "rare-state"}


def test_actions_that_are_zero(make_recording, healthy, check_all):
    zero = np.zeros((40, 3), np.float32)
    some = check_all([*healthy, make_recording(7, action=zero)])["zero-actions"]
    assert some.severity == Severity.WARNING and "1 of 7" in some.message
    everywhere = check_all([make_recording(seed, action=zero) for seed in range(NUM)])
    assert everywhere["zero-actions"].severity == Severity.ERROR
    assert everywhere["constant-action"].severity == Severity.ERROR


def test_first_actions_that_are_zero(healthy, check_all):
    for recording in healthy:
        recording.action[0, :2] = 1e-7
    assert "2 of 3 dimensions (0-1)" in check_all(healthy)["first-action-zero"].message
    # A robot that mostly rests is no reason to wonder about its first step.
    for recording in healthy:
        recording.action[:30, :2] = 0
    assert "first-action-zero" not in check_all(healthy)


def test_values_far_out_of_their_range(healthy, check_all):
    healthy[2].action[5, 1] = 500.0
    found = check_all(healthy)["action-outliers"]
    assert "dimension 1, " in found.message and found.message.endswith("in episode 2.")


def test_equal_episodes_and_splits_that_share_them(make_recording, healthy, check_all):
    copy = make_recording(2, episode_id="copy", split="val")
    found = check_all([*healthy, copy])
    assert set(found) == {"duplicates"}
    assert "1 episode is equal to another one: episode 2 = copy; 1 of them" in found["duplicates"].message


def test_episodes_that_were_encoded_anew_are_nearly_equal(make_recording, healthy, check_all):
    def encode(image):
        small = cv2.resize(image, (120, 90), interpolation=cv2.INTER_AREA)
        return cv2.imdecode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 70])[1], cv2.IMREAD_COLOR)

    large = [cv2.resize(image, (240, 180)) for image in healthy[3].frames["main"]]
    healthy[3] = make_recording(3, frames={"main": large})
    images = {"main": [encode(image) for image in large]}
    copy = make_recording(3, episode_id="copy", frames=images, motion=healthy[3].motion * np.float32(1.02))
    found = check_all([*healthy, copy])
    assert "episode 3 = copy" in found["near-duplicates"].message
    assert "duplicates" not in found
    # The same scene with another course of motion is another episode.
    motion = np.linspace(0, 0.03, 40, dtype=np.float32) ** 2
    assert "near-duplicates" not in check_all([*healthy, make_recording(3, frames=images, motion=motion)])


def test_a_sample_of_rows_is_bounded_and_fair():
    sample = RowSample(limit=1000)
    for begin in range(0, 20_000, 500):
        sample.add(np.arange(begin, begin + 500, dtype=np.float32)[:, None])
    assert sample.rows.shape == (1000, 1)
    assert abs(sample.rows.mean() - 10_000) < 1000
    assert (np.diff(sample.rows[:, 0]) > 0).all()


def test_strips_come_from_all_over_the_dataset(make_recording):
    survey = Survey(Thresholds(), num_strips=4)
    for seed in range(40):
        survey.add(make_recording(seed, num_steps=4))
    shown = [int(strip.episode_id.split()[1]) for strip in survey.strips]
    assert len(shown) == 4 and shown == sorted(shown) and shown[-1] > 10
    assert survey.strips[0].image.shape == (96, PROBES * 128, 3)


def test_names_are_short():
    assert name_dimensions([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert name_some(list("abcdef")) == "a, b, c, d and 2 more"
