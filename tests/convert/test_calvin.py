"""CALVIN folders: windows and recordings, damage, and a pickle that is not trusted."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from como_jax.convert.calvin.annotations import read_annotations, read_pickled_object
from como_jax.convert.calvin.builder import EMPTY, Calvin, CalvinSettings
from como_jax.convert.calvin.segments import Segment, count_repeated
from como_jax.errors import ConversionError

SHAPES = {"rel_actions": 7, "actions": 7, "robot_obs": 15, "scene_obs": 24}


def image(number: int, size: int) -> np.ndarray:
    """A smooth image that no other step has, brighter to the right and the bottom."""
    ramp = np.linspace(0, 100, size, dtype=np.float32)
    red, green = np.meshgrid(ramp, ramp)
    return np.stack([red, green, np.full_like(red, 10 * (number % 20))], -1).astype(np.uint8)


def step_arrays(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    numbers = {key: rng.uniform(-1, 1, size) for key, size in SHAPES.items()}
    images = {"rgb_static": image(number, 40), "rgb_gripper": image(number, 16)}
    return {**numbers, **images, "depth_static": np.ones((40, 40), np.float32)}


def write_step(folder: Path, number: int, **changes: Any) -> None:
    arrays = {**step_arrays(number), **changes}
    np.savez(
        folder / f"episode_{number:07d}.npz",
        **{key: array for key, array in arrays.items() if array is not None},
        allow_pickle=True,
    )


def write_annotations(folder: Path, texts: Any, windows: Any, name: str = "lang_annotations/auto_lang_ann.npy") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "language": {"ann": texts, "task": ["lift"] * len(texts), "emb": np.ones((len(texts), 1, 4), np.float32)},
        "info": {"episodes": [], "indx": windows},
    }
    np.save(path, content)
    return path


def write_split(
    folder: Path, ranges: Sequence[tuple[int, int]], texts: Sequence[str] = (), windows: Sequence[Any] = ()
) -> Path:
    folder.mkdir(parents=True)
    for first, last in ranges:
        for number in range(first, last + 1):
            write_step(folder, number)
    np.save(folder / "ep_start_end_ids.npy", np.array(ranges))
    np.save(folder / "ep_lens.npy", np.array([last - first + 1 for first, last in ranges]))
    if texts:
        write_annotations(folder, list(texts), list(windows))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twenty steps in two recordings with two annotated windows to train on, and six with one to validate on."""
    root = tmp_path / "task_D_D"
    # Numbers of windows are NumPy's, as in the published files.
    windows = [(np.int64(100), np.int64(104)), (np.int64(103), np.int64(108))]
    write_split(root / "training", [(100, 111), (205, 212)], ["lift the block", "open the drawer "], windows)
    write_split(root / "validation", [(40, 45)], ["turn on the light"], [(41, 44)])
    return root


def convert(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return Calvin(out, CalvinSettings(source=str(source), **settings)).convert()


def messages(report: dict[str, Any]) -> list[str]:
    return [warning["message"] for warning in report["warnings"]]


def test_annotated_windows_become_episodes_with_their_last_step(tmp_path, source, check_dataset):
    report = convert(source, tmp_path / "out")
    tables = check_dataset(tmp_path / "out")
    rows = tables["train"]
    assert [row["language_instruction"] for row in rows] == ["lift the block", "open the drawer"]
    assert [row["num_steps"] for row in rows] == [5, 6]
    assert [row["episode_id"] for row in rows] == [
        "training/language/000000/0000100",
        "training/language/000001/0000103",
    ]
    assert [row["language_instruction"] for row in tables["val"]] == ["turn on the light"]
    assert {row["control_rate"] for row in (*rows, *tables["val"])} == {30.0}
    # Windows overlap in the published data too: steps 103 and 104 are in both.
    assert messages(report) == ["2 of the 9 different steps of training are in more than one episode"]


def test_steps_are_those_of_the_files(tmp_path, source, check_dataset):
    convert(source, tmp_path / "out")
    row = check_dataset(tmp_path / "out")["train"][1]
    files = [np.load(source / "training" / f"episode_{number:07d}.npz") for number in range(103, 109)]
    np.testing.assert_array_equal(np.float32(row["action"]), [np.float32(file["rel_actions"]) for file in files])
    np.testing.assert_array_equal(np.float32(row["state"]), [np.float32(file["robot_obs"]) for file in files])
    builder = tfds.builder_from_directory(tmp_path / "out")
    assert builder.info.metadata["cameras"] == ["rgb_static", "rgb_gripper"]
    records = builder.as_data_source("train")
    for index, file in enumerate(files):
        for camera in ("rgb_static", "rgb_gripper"):
            stored = records[5 + index]["observation"][camera].astype(int)
            assert np.abs(stored - file[camera]).max() <= 6
    expected = [0, *(np.abs(np.diff([file["rgb_static"].mean() for file in files])) / 255)]
    np.testing.assert_allclose(row["motion"], expected, atol=0.004)


def test_other_keys_are_joined_in_the_order_asked_for(tmp_path, source, check_dataset):
    keys = {"action": ("actions",), "state": ("scene_obs", "robot_obs"), "camera": ("rgb_gripper",)}
    convert(source, tmp_path / "out", image_size=8, **keys)
    (row,) = check_dataset(tmp_path / "out")["val"]
    arrays = [step_arrays(number) for number in range(41, 45)]
    np.testing.assert_array_equal(np.float32(row["action"]), [np.float32(each["actions"]) for each in arrays])
    states = [np.float32([*each["scene_obs"], *each["robot_obs"]]) for each in arrays]
    np.testing.assert_array_equal(np.float32(row["state"]), states)
    record = tfds.builder_from_directory(tmp_path / "out").as_data_source("val")[0]
    assert record["observation"]["rgb_gripper"].shape == (8, 8, 3)
    assert "rgb_static" not in record["observation"]


def test_play_is_cut_to_clips_inside_recordings(tmp_path, source, check_dataset):
    report = convert(source, tmp_path / "out", segments="play", clip_seconds=0.17, action=(), state=())
    tables = check_dataset(tmp_path / "out")
    # Clips of five steps; a single step at the end joins the one before.
    starts = [(row["episode_id"].rpartition("/")[2], row["num_steps"]) for row in tables["train"]]
    assert starts == [("0000100", 5), ("0000105", 5), ("0000110", 2), ("0000205", 5), ("0000210", 3)]
    assert [row["num_steps"] for row in tables["val"]] == [6]
    assert {row["language_instruction"] for row in tables["train"]} == {""}
    assert tables["train"][0]["action"] is None
    assert messages(report) == ["no action was converted", "no state was converted"]


def test_steps_that_are_converted_twice_are_counted(tmp_path, source, check_dataset):
    report = convert(source, tmp_path / "out", segments="both")
    rows = check_dataset(tmp_path / "out")["train"]
    assert [row["num_steps"] for row in rows] == [5, 6, 12, 8]
    assert messages(report) == [
        "9 of the 20 different steps of training are in more than one episode",
        "4 of the 6 different steps of validation are in more than one episode",
    ]


def test_repeated_steps_agree_with_counting_them_one_by_one():
    rng = np.random.default_rng(0)
    segments = [Segment(str(start), start, start + 1 + int(rng.integers(9))) for start in rng.integers(0, 99, 30)]
    counts = np.bincount([number for each in segments for number in range(each.start, each.stop)])
    impossible = Segment("backwards", 50, 20)
    assert count_repeated([*segments, impossible]) == ((counts > 0).sum(), (counts > 1).sum())


DAMAGE = {
    "missing": (None, "the file is missing"),
    "truncated": (b"half", "the file is damaged"),
    "empty": (b"", "the file is damaged"),
    "no zip": (b"nothing of the kind", "the file is damaged"),
    "no camera": ({"rgb_gripper": None}, "the file has no rgb_gripper"),
    "no action": ({"rel_actions": None}, "the file has no rel_actions"),
    "NaN": ({"rel_actions": np.full(7, np.nan)}, "rel_actions is not finite"),
    "too large": ({"robot_obs": np.full(15, 1e300)}, "robot_obs is not finite"),
    "length": ({"robot_obs": np.zeros(14)}, "robot_obs has shape (14,) and type float64, not 15 numbers"),
    "words": ({"robot_obs": np.array(["a"] * 15)}, "robot_obs has shape (15,) and type <U1, not 15 numbers"),
    "image": ({"rgb_static": np.zeros((40, 40))}, "rgb_static has shape (40, 40) and type float64, not an image"),
    "no pixels": ({"rgb_static": np.zeros((0, 4, 3), np.uint8)}, "rgb_static has shape (0, 4, 3) and type uint8"),
    "pickle": ({"rel_actions": np.array([print] * 7)}, "the file is damaged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_step_costs_a_window_but_only_cuts_a_recording(tmp_path, source, check_dataset, kind):
    damage, reason = DAMAGE[kind]
    path = source / "training" / "episode_0000107.npz"
    if damage is None:
        path.unlink()
    elif damage == b"half":
        path.write_bytes(path.read_bytes()[:2000])
    elif isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        write_step(path.parent, 107, **damage)
    report = convert(source, tmp_path / "out", segments="both")
    rows = check_dataset(tmp_path / "out")["train"]
    assert [row["num_steps"] for row in rows] == [5, 7, 4, 8]
    assert [row["episode_id"][-7:] for row in rows] == ["0000100", "0000100", "0000108", "0000205"]
    (window,), (recording,) = report["left_out"], report["partially_converted"]
    assert window["source"].startswith("training/language/000001[103:109]")
    assert window["reasons"][0].startswith(f"step 107: {reason}")
    assert recording["reasons"][0].startswith(f"steps 107 to 107: {reason}")


def test_a_gap_is_one_line_of_the_report(tmp_path, source):
    for number in range(102, 110):
        (source / "training" / f"episode_{number:07d}.npz").unlink()
    report = convert(source, tmp_path / "out", segments="play")
    assert report["partially_converted"][0]["reasons"] == ["steps 102 to 109: the file is missing"]


def test_numbers_that_are_no_range_are_reported(tmp_path, source, check_dataset):
    folder = source / "training"
    write_annotations(folder, ["back", "below", "far", "lift"], [(108, 103), (-5, 3), (1, 10**15), (100, 104)])
    np.save(folder / "ep_start_end_ids.npy", np.array([[111, 100], [0, 2**62], [205, 212]]))
    report = convert(source, tmp_path / "out", segments="both")
    assert len(check_dataset(tmp_path / "out")["train"]) == 2
    reasons = [entry["reasons"][0] for entry in report["left_out"]]
    assert reasons == [
        "there are no steps from 108 to 103",
        "there are no steps from -5 to 3",
        f"there are no steps from 1 to {10**15}",
        "there are no steps from 111 to 100",
        f"there are no steps from 0 to {2**62}",
    ]


def test_texts_are_made_valid_and_empty_ones_are_reported(tmp_path, source, check_dataset):
    write_annotations(source / "training", ["caf\u00e9 \udcff", " "], [(100, 104), (103, 108)])
    report = convert(source, tmp_path / "out")
    assert [row["language_instruction"] for row in check_dataset(tmp_path / "out")["train"]] == ["caf\u00e9 ?", ""]
    assert EMPTY in messages(report)


class Harm:
    """Runs a command when it is unpickled without care."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_something_is_refused(tmp_path, source, protocol):
    path = source / "training" / "lang_annotations" / "auto_lang_ann.npy"
    header = path.read_bytes().partition(b"\n")[0] + b"\n"
    harm = np.array({"language": {"ann": [Harm(tmp_path / "harm")]}}, dtype=object)
    path.write_bytes(header + pickle.dumps(harm, protocol))
    with pytest.raises(ConversionError, match=r"auto_lang_ann.npy is refused: its pickle asks for \w+\.\w+"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\neval\n(V1+1\ntR.",
        b"cnumpy\nload\n(Vx.npy\ntR.",
        b"cnumpy\nndarray.__class__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.ctypes\x93.",
        b"Pid\n.",
        b"\x82\x01.",
    ],
)
def test_handmade_pickles_are_refused(tmp_path, source, code):
    path = source / "training" / "lang_annotations" / "auto_lang_ann.npy"
    path.write_bytes(path.read_bytes().partition(b"\n")[0] + b"\n" + code)
    with pytest.raises(ConversionError, match="auto_lang_ann.npy"):
        read_pickled_object(path)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6, 0.99])
def test_truncated_annotations_are_one_error(source, share):
    path = source / "training" / "lang_annotations" / "auto_lang_ann.npy"
    content = path.read_bytes()
    path.write_bytes(content[: round(share * len(content))])
    with pytest.raises(ConversionError, match="auto_lang_ann.npy"):
        read_annotations(source / "training")


def test_random_damage_to_annotations_gives_data_or_one_error(tmp_path):
    path = write_annotations(tmp_path, ["lift", "drop"], [(np.int64(1), np.int64(5)), (3, 9)])
    content = path.read_bytes()
    rng = np.random.default_rng(1)
    outcomes = []
    for _ in range(500):
        damaged = bytearray(content)
        for position in rng.integers(128, len(damaged), 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            outcomes.append(read_annotations(tmp_path) is not None)
        except ConversionError:
            outcomes.append(False)
    assert any(outcomes) and not all(outcomes)
    # NumPy's own functions would have changed the type that all arrays share.
    assert np.float32(0.5) + np.zeros(2, np.float32).sum() == 0.5


def test_pickles_hold_arrays_and_numbers_of_every_kind(tmp_path):
    content = {"a": np.arange(6, dtype=">i4").reshape(2, 3), "b": [np.float32(0.5), np.int64(-7)], "c": (1, "x", None)}
    content["d"] = np.array(["text", 3], dtype=object)
    np.save(tmp_path / "x.npy", content)
    expected = {"a": [[0, 1, 2], [3, 4, 5]], "b": [0.5, -7], "c": [1, "x", None], "d": ["text", 3]}
    assert read_pickled_object(tmp_path / "x.npy") == expected


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_annotations_of_both_generations_of_numpy_are_read(tmp_path, module):
    path = write_annotations(tmp_path, ["lift", "drop"], [(np.int64(1), np.int64(5)), (3, 9)])
    content = path.read_bytes()
    header, _, code = content.partition(b"\n")
    # Protocol 3, as NumPy 1 writes it, has the name as it is.
    code = pickle.dumps(pickle.loads(code), 3).replace(b"numpy._core.multiarray", module.encode())
    path.write_bytes(header + b"\n" + code)
    assert module.encode() in path.read_bytes()
    found = read_annotations(tmp_path)
    assert [(each.start, each.end, each.instruction) for each in found] == [(1, 5, "lift"), (3, 9, "drop")]


@pytest.mark.parametrize(
    ("texts", "windows", "message"),
    [
        (["a", "b"], [(1, 5)], "has 2 texts for 1 windows"),
        (["a"], [(1, 5, 7)], "does not hold the texts and windows"),
        (["a"], [(1.5, 5)], "does not hold the texts and windows"),
        ([b"a"], [(1, 5)], "has an annotation that is not text"),
    ],
)
def test_annotations_that_make_no_sense(tmp_path, texts, windows, message):
    write_annotations(tmp_path, texts, windows)
    with pytest.raises(ConversionError, match=message):
        read_annotations(tmp_path)


def test_what_is_missing_from_the_folder(tmp_path, source, check_dataset):
    (source / "validation" / "lang_annotations" / "auto_lang_ann.npy").unlink()
    report = convert(source, tmp_path / "a")
    assert set(check_dataset(tmp_path / "a")) == {"train"}
    assert "validation has no language annotations" in messages(report)
    (source / "validation").rename(tmp_path / "elsewhere")
    assert "there is no folder 'validation'" in messages(convert(source, tmp_path / "b"))
    (source / "training" / "lang_annotations" / "auto_lang_ann.npy").unlink()
    with pytest.raises(ConversionError, match="has no language annotations; .segments. play"):
        convert(source, tmp_path / "c")
    (source / "training" / "ep_start_end_ids.npy").unlink()
    with pytest.raises(ConversionError, match="ep_start_end_ids.npy is missing"):
        convert(source, tmp_path / "c", segments="play")
    np.save(source / "training" / "ep_start_end_ids.npy", np.zeros(3))
    with pytest.raises(ConversionError, match="does not hold pairs of step numbers"):
        convert(source, tmp_path / "c", segments="play")
    with pytest.raises(ConversionError, match="neither of the folders training and validation"):
        convert(source / "training", tmp_path / "c")
    with pytest.raises(ConversionError, match="gone does not exist"):
        convert(tmp_path / "gone", tmp_path / "c")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"segments": "all"}, "segments must be one of language, play, both, got 'all'"),
        ({"clip_seconds": 0.0}, "clip_seconds must be a positive number"),
        ({"camera": ()}, "camera must name one or more"),
        ({"camera": ("rgb_tactile",)}, "camera must be different ones of rgb_static, rgb_gripper"),
        ({"action": ("actions", "actions")}, "action must be different ones of rel_actions, actions"),
        ({"state": ("depth_static",)}, "state must be different ones of robot_obs, scene_obs"),
    ],
)
def test_settings_that_cannot_be_followed(settings, message):
    with pytest.raises(ConversionError, match=message):
        CalvinSettings(source="x", **settings)


def test_the_same_bytes_in_a_worker_of_its_own(tmp_path, source):
    """A copy of the builder, as another process gets it, gives the same episodes for a source alone."""
    builder = Calvin(tmp_path / "out", CalvinSettings(source=str(source), segments="both"))
    for each in builder.sources():
        copy = pickle.loads(pickle.dumps(builder))
        ours, theirs = list(builder.episodes(each)), list(copy.episodes(each))
        assert [episode.steps[0].images for episode in ours] == [episode.steps[0].images for episode in theirs]
