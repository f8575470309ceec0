"""LIBERO's HDF5 files, as the published ones are made, and with damage."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tensorflow_datasets as tfds

from como_jax.convert.catalog import BUILDERS, make_settings
from como_jax.convert.libero.builder import NAMED, OUT_OF_RANGE, UNPUBLISHED, is_noop, turn
from como_jax.convert.libero.demonstrations import demonstration_names, named_instruction
from como_jax.errors import ConversionError

NAME = "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5"


def write_file(path: Path, lengths: list[int], instruction: Any = "turn on the stove", seed: int = 0) -> Path:
    """Demonstrations with the published structure, and images whose upper left corner, as stored, is red."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"problem_name": "p", "language_instruction": instruction})
        data.attrs["env_args"], data.attrs["num_demos"] = json.dumps({"type": 1}), len(lengths)
        data.attrs["macros_image_convention"] = "opengl"
        for index, length in enumerate(lengths):
            demo = data.create_group(f"demo_{index}")
            demo["actions"] = rng.uniform(-1, 1, (length, 7))
            demo["dones"], demo["rewards"] = np.zeros(length, np.uint8), np.zeros(length, np.uint8)
            demo["states"], demo["robot_states"] = rng.normal(size=(length, 20)), rng.normal(size=(length, 9))
            sizes = {"ee_pos": 3, "ee_ori": 3, "ee_states": 6, "gripper_states": 2, "joint_states": 7}
            for key, size in sizes.items():
                demo[f"obs/{key}"] = rng.normal(size=(length, size))
            for camera in ("agentview_rgb", "eye_in_hand_rgb"):
                images = np.full((length, 32, 32, 3), 40, np.uint8)
                images += (5 * np.arange(length, dtype=np.uint8))[:, None, None, None]
                images[:, :12, :12] = (250, 20, 20)
                demo[f"obs/{camera}"] = images
    return path


def convert(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    settings = make_settings("libero", {"source": str(source), "validation_fraction": 0.0, **settings})
    return BUILDERS["libero"](out, settings, None).convert()


def image(record: Any, camera: str = "agentview_rgb") -> np.ndarray:
    return np.asarray(record["observation"][camera]).astype(int)


def records(out: Path) -> Any:
    return tfds.builder_from_directory(out).as_data_source("train")


def test_demonstrations_are_converted_with_actions_states_and_language(
    tmp_path: Path, check_dataset: Callable[[Path], dict[str, Any]]
) -> None:
    path = write_file(tmp_path / "libero 90" / NAME, [4, 6])
    report = convert(path.parent, tmp_path / "out")
    assert report["sources"] == {"found": 2, "converted": 2, "partially_converted": 0, "left_out": 0}
    rows = check_dataset(tmp_path / "out")["train"]
    assert [row["episode_id"] for row in rows] == [f"{NAME}/demo_0", f"{NAME}/demo_1"]
    with h5py.File(path) as file:
        for row, demo in zip(rows, ("demo_0", "demo_1"), strict=True):
            group = file[f"data/{demo}"]
            # Published images show what the action of the same index led to.
            np.testing.assert_array_equal(np.float32(row["action"]), np.float32(group["actions"][1:]))
            state = np.concatenate([group["obs/ee_states"][()], group["obs/gripper_states"][()]], axis=1)
            np.testing.assert_array_equal(np.float32(row["state"]), np.float32(state[:-1]))
            assert row["control_rate"] == 20 and row["language_instruction"] == "turn on the stove"


@pytest.mark.parametrize(("orientation", "corner"), [("rotate180", (-1, -1)), ("flip", (-1, 0)), ("stored", (0, 0))])
def test_images_are_turned(tmp_path: Path, orientation: str, corner: tuple[int, int]) -> None:
    write_file(tmp_path / "in" / NAME, [3])
    convert(tmp_path / "in", tmp_path / "out", orientation=orientation)
    for camera in ("agentview_rgb", "eye_in_hand_rgb"):
        found = image(records(tmp_path / "out")[1], camera)
        assert np.abs(found[corner] - (250, 20, 20)).max() < 12
        opposite = found[-1 - corner[0], -1 - corner[1]]
        assert np.abs(opposite - 45).max() < 12


def test_files_that_store_images_upright_are_not_turned_twice() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    np.testing.assert_array_equal(turn(image, "flip", "opengl"), np.flipud(image))
    np.testing.assert_array_equal(turn(image, "rotate180", ""), np.rot90(image, 2))
    np.testing.assert_array_equal(turn(image, "flip", "opencv"), image)
    np.testing.assert_array_equal(turn(image, "rotate180", "opencv"), np.fliplr(image))
    np.testing.assert_array_equal(turn(image, "stored", "opengl"), image)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_images_states_and_actions_belong_together(
    tmp_path: Path, shift: int, check_dataset: Callable[[Path], dict[str, Any]]
) -> None:
    path = write_file(tmp_path / "in" / NAME, [6])
    keys = ("robot_states", "joint_states", "ee_pos", "ee_ori")
    convert(path.parent, tmp_path / "out", action_shift=shift, state=keys, camera=("eye_in_hand_rgb",))
    [row] = check_dataset(tmp_path / "out")["train"]
    with h5py.File(path) as file:
        demo = file["data/demo_0"]
        np.testing.assert_array_equal(np.float32(row["action"]), np.float32(demo["actions"][shift:]))
        parts = [demo["robot_states" if key == "robot_states" else f"obs/{key}"][: 6 - shift] for key in keys]
        np.testing.assert_array_equal(np.float32(row["state"]), np.float32(np.concatenate(parts, axis=1)))
    stored = [image(record, "eye_in_hand_rgb") for record in records(tmp_path / "out")]
    np.testing.assert_allclose([each[2, 2, 1] for each in stored], 40 + 5 * np.arange(6 - shift), atol=2)
    share = 1 - (12 / 32) ** 2
    np.testing.assert_allclose(row["motion"][1:], share * 5 / 255, atol=0.002)


def test_files_made_by_a_replay_are_told(tmp_path: Path) -> None:
    path = write_file(tmp_path / "in" / NAME, [3])
    with h5py.File(path, "a") as file:
        file["data"].attrs.clear()
    report = convert(path.parent, tmp_path / "out")
    assert [warning["message"] for warning in report["warnings"]] == sorted([NAMED, UNPUBLISHED])
    report = convert(path.parent, tmp_path / "out0", action_shift=0)
    assert [warning["message"] for warning in report["warnings"]] == [NAMED]


def test_lost_demonstrations_are_told(tmp_path: Path) -> None:
    path = write_file(tmp_path / "in" / NAME, [3, 3])
    with h5py.File(path, "a") as file:
        del file["data/demo_0"]
    report = convert(path.parent, tmp_path / "out")
    assert [warning["message"] for warning in report["warnings"]] == [f"{NAME} announces 2 demonstrations and holds 1"]


def test_actions_out_of_range_are_told(tmp_path: Path) -> None:
    path = write_file(tmp_path / "in" / NAME, [3])
    with h5py.File(path, "a") as file:
        file["data/demo_0/actions"][2, 0] = -1.5
    report = convert(path.parent, tmp_path / "out")
    assert [warning["message"] for warning in report["warnings"]] == [OUT_OF_RANGE]


@pytest.mark.parametrize("options", [{}, {"chunks": (5, 32, 32, 3), "compression": "gzip"}])
def test_long_demonstrations_are_read_in_blocks(
    tmp_path: Path, options: dict[str, Any], check_dataset: Callable[[Path], dict[str, Any]]
) -> None:
    path = write_file(tmp_path / "in" / NAME, [70])
    images = np.broadcast_to(np.arange(70, dtype=np.uint8)[:, None, None, None], (70, 32, 32, 3))
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs/agentview_rgb"]
        file["data/demo_0/obs"].create_dataset("agentview_rgb", data=images, **options)
        file["data/demo_0/actions"][10:40] = 0
    convert(path.parent, tmp_path / "out", drop_noops=True)
    check_dataset(tmp_path / "out")
    found = [image(record).mean() for record in records(tmp_path / "out")]
    # The first still step opens the gripper; the others, up to stored action 39, are left out.
    np.testing.assert_allclose(found, [*range(10), *range(39, 69)], atol=1)


def test_demonstrations_come_in_order_of_their_numbers(tmp_path: Path) -> None:
    with h5py.File(write_file(tmp_path / NAME, [2] * 12)) as file:
        assert demonstration_names(file["data"]) == [f"demo_{index}" for index in range(12)]


def test_suites_are_part_of_the_names(tmp_path: Path, check_dataset: Callable[[Path], dict[str, Any]]) -> None:
    for suite in ("libero_goal", "libero_90"):
        write_file(tmp_path / "in" / suite / NAME, [3, 3])
    convert(tmp_path / "in" / "libero_goal", tmp_path / "goal")
    convert(tmp_path / "in", tmp_path / "both")
    goal = check_dataset(tmp_path / "goal")["train"]
    assert [row["episode_id"] for row in goal] == [f"libero_goal/{NAME}/demo_{index}" for index in range(2)]
    both = check_dataset(tmp_path / "both")["train"]
    assert [row["source_file"] for row in both] == [f"libero_90/{NAME}"] * 2 + [f"libero_goal/{NAME}"] * 2


def test_both_splits_hold_every_task(tmp_path: Path, check_dataset: Callable[[Path], dict[str, Any]]) -> None:
    for index in range(3):
        write_file(tmp_path / "in" / f"task_{index}_demo.hdf5", [3] * 4, instruction=f"task {index}")
    convert(tmp_path / "in", tmp_path / "out", validation_fraction=0.1)
    tables = check_dataset(tmp_path / "out")
    for split in ("train", "val"):
        assert {row["language_instruction"] for row in tables[split]} == {"task 0", "task 1", "task 2"}
    assert len(tables["val"]) == 3


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [(["turn", "on", "it"], "turn on it"), ("", "turn on the stove"), (None, "turn on the stove"), ('"go"', "go")],
)
def test_the_instruction_comes_from_the_attribute_or_the_name(
    tmp_path: Path, instruction: Any, expected: str, check_dataset: Callable[[Path], dict[str, Any]]
) -> None:
    write_file(tmp_path / "in" / NAME, [3], instruction)
    convert(tmp_path / "in", tmp_path / "out")
    assert check_dataset(tmp_path / "out")["train"][0]["language_instruction"] == expected


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("LIVING_ROOM_SCENE10_pick_it_up_demo.hdf5", "pick it up"),
        ("STUDY_SCENE1_put_the_book_in_demo.hdf5", "put the book in"),
        ("open_the_middle_drawer_of_the_cabinet_demo.hdf5", "open the middle drawer of the cabinet"),
    ],
)
def test_names_become_instructions(name: str, instruction: str) -> None:
    assert named_instruction(name) == instruction


@pytest.mark.parametrize(
    "stored",
    [
        np.bytes_(b'{"language_instruction": "turn \xff on"}'),
        b'{"language_instruction": "turn \xff on"}',
        '{"language_instruction": "\\ud800"}',
        '{"language_instruction": 3}',
        "[" * 3000,
        "[]",
        np.arange(3),
        h5py.Empty("f"),
    ],
)
def test_an_instruction_that_is_no_text_gives_way_to_the_name(
    tmp_path: Path, stored: Any, check_dataset: Callable[[Path], dict[str, Any]]
) -> None:
    path = write_file(tmp_path / "in" / NAME, [3])
    with h5py.File(path, "a") as file:
        variable_length = h5py.string_dtype() if type(stored) is bytes else None
        file["data"].attrs.create("problem_info", stored, dtype=variable_length)
    report = convert(path.parent, tmp_path / "out")
    assert [warning["message"] for warning in report["warnings"]] == [NAMED]
    assert check_dataset(tmp_path / "out")["train"][0]["language_instruction"] == "turn on the stove"


def test_steps_without_motion_are_left_out_when_asked(
    tmp_path: Path, check_dataset: Callable[[Path], dict[str, Any]]
) -> None:
    action = np.zeros((5, 7))
    action[:, -1] = (-1, -1, 1, 1, 1)
    action[4, 0] = 0.5
    assert is_noop(action).tolist() == [True, True, False, True, False]
    path = write_file(tmp_path / "in" / NAME, [6])
    with h5py.File(path, "a") as file:
        file["data/demo_0/actions"][1:] = action
    report = convert(path.parent, tmp_path / "out", drop_noops=True)
    [row] = check_dataset(tmp_path / "out")["train"]
    np.testing.assert_array_equal(row["action"], action[[2, 4]])
    assert "drop_noops" in report["warnings"][0]["message"]


def break_demo(demo: h5py.Group, kind: str) -> None:
    if kind == "nan":
        demo["actions"][1, 2] = np.nan
        return
    key, value = {
        "no camera": ("obs/eye_in_hand_rgb", None),
        "no obs": ("obs", None),
        "no actions": ("actions", None),
        "images": ("obs/agentview_rgb", np.zeros((2, 32, 32, 3), np.uint8)),
        "floats": ("obs/agentview_rgb", np.zeros((4, 32, 32, 3))),
        "states": ("obs/ee_states", np.zeros((9, 6))),
        "width": ("actions", np.zeros((4, 9))),
        "axes": ("actions", np.zeros(4)),
        "scalar": ("obs/ee_states", 3.0),
        "text": ("obs/ee_states", [["a"] * 6] * 4),
        "no pixels": ("obs/agentview_rgb", np.zeros((4, 0, 32, 3), np.uint8)),
        "no group": ("obs", 1.0),
        "too short": ("actions", np.zeros((1, 7))),
        "empty": ("actions", np.zeros((0, 7))),
    }[kind]
    del demo[key]
    if value is not None:
        demo[key] = value


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nan", "some action is not finite"),
        ("no camera", "has no array obs/eye_in_hand_rgb"),
        ("no obs", "has no array obs/agentview_rgb"),
        ("no actions", "has no array actions"),
        ("images", "obs/agentview_rgb has 2 steps, and actions 4"),
        ("floats", "obs/agentview_rgb has shape .* and type float64, not images"),
        ("states", "obs/ee_states has 9 steps, and actions 4"),
        ("width", "actions has shape .* and type float64, not 7 numbers a step"),
        ("axes", "actions has shape .* not 7 numbers a step"),
        ("scalar", "obs/ee_states has no steps, and actions 4"),
        ("text", "obs/ee_states has shape .* and type object, not 6 numbers a step"),
        ("no pixels", "obs/agentview_rgb has shape .* not images"),
        ("no group", "has no array obs/agentview_rgb|cannot be read as HDF5"),
        ("too short", "holds no steps"),
        ("empty", "holds no steps"),
    ],
)
def test_a_damaged_demonstration_is_left_out_and_the_others_are_not(
    tmp_path: Path, kind: str, reason: str, check_dataset: Callable[[Path], dict[str, Any]]
) -> None:
    path = write_file(tmp_path / "in" / NAME, [4, 4])
    with h5py.File(path, "a") as file:
        break_demo(file["data/demo_1"], kind)
    report = convert(path.parent, tmp_path / "out")
    assert [row["episode_id"] for row in check_dataset(tmp_path / "out")["train"]] == [f"{NAME}/demo_0"]
    [entry] = report["left_out"]
    assert entry["source"] == f"{NAME}/demo_1"
    assert re.search(reason, entry["reasons"][0])


@pytest.mark.parametrize(
    ("arrays", "remedy"),
    [
        (
            {"states": (4, 32)},
            "it holds actions [4, 7], states [4, 32]: states of the simulator without images; replay",
        ),
        ({"obs/agentview_image": (4, 8, 8, 3)}, "obs/agentview_image [4, 8, 8, 3]; these are not LIBERO's names: save"),
        ({"obs/agentview_rgb": (4, 8, 8, 3)}, "obs/agentview_rgb [4, 8, 8, 3]; `camera` and `state` choose"),
        ({}, "it holds actions [4, 7]"),
    ],
    ids=["robosuite", "robomimic", "without wrist", "actions"],
)
def test_files_of_other_tools_are_told_by_what_they_hold(tmp_path: Path, arrays: dict[str, Any], remedy: str) -> None:
    (tmp_path / "in").mkdir()
    with h5py.File(tmp_path / "in" / "demo.hdf5", "w") as file:
        for name, shape in ({"actions": (4, 7)} | arrays).items():
            file[f"data/demo_1/{name}"] = np.zeros(shape, np.float64 if len(shape) == 2 else np.uint8)
    with pytest.raises(ConversionError, match=re.escape(remedy)):
        convert(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("damage", ["truncated", "zero", "text", "no data", "a folder"])
def test_a_damaged_file_is_reported(tmp_path: Path, damage: str) -> None:
    good = write_file(tmp_path / "in" / NAME, [3])
    bad = good.with_name("other task_demo.hdf5")
    if damage == "no data":
        with h5py.File(bad, "w") as file:
            file["something"] = 1
    elif damage == "a folder":
        bad.mkdir()
        (bad / "inner.hdf5").write_bytes(b"")
    else:
        content = {"truncated": good.read_bytes()[:3000], "zero": b"", "text": b"hello"}[damage]
        bad.write_bytes(content)
    report = convert(good.parent, tmp_path / "out")
    assert report["sources"] == {"found": 2, "converted": 1, "partially_converted": 0, "left_out": 1}
    assert report["left_out"][0]["source"].startswith("other task_demo.hdf5")


def test_a_random_flip_never_stops_the_conversion(tmp_path: Path) -> None:
    content = bytearray(write_file(tmp_path / "good" / NAME, [3]).read_bytes())
    rng = np.random.default_rng(0)
    write_file(tmp_path / "in" / NAME, [3])
    for case in range(20):
        damaged = bytearray(content)
        # The first bytes hold the structure of the file; images come later.
        for position in rng.integers(0, 4000, 3):
            damaged[position] = rng.integers(256)
        (tmp_path / "in" / "bad_demo.hdf5").write_bytes(damaged)
        report = convert(tmp_path / "in", tmp_path / f"out{case}")
        counts = report["sources"]
        assert counts["found"] == sum(counts[key] for key in ("converted", "partially_converted", "left_out")) >= 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orientation": "up"}, "orientation must be one of rotate180, flip, stored"),
        ({"camera": ()}, "camera must name one or more of agentview_rgb, eye_in_hand_rgb"),
        ({"state": ("joints",)}, "state must be different ones of ee_states, .*got joints"),
        ({"camera": ("front",)}, "camera must be different ones of agentview_rgb, eye_in_hand_rgb, got front"),
        ({"camera": ("agentview_rgb",) * 2}, "camera must be different ones"),
        ({"action_shift": -1}, "action_shift must be 0 or more, got -1"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    write_file(tmp_path / "in" / NAME, [3])
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path / "in", tmp_path / "out", **settings)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "in").mkdir()
    with pytest.raises(ConversionError, match="holds no HDF5 file"):
        convert(tmp_path / "in", tmp_path / "out")
