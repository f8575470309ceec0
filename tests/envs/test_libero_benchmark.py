"""LIBERO's package: its tasks, initial states, config file and meshes."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from etils import epath

from como_jax.convert.libero import builder, demonstrations
from como_jax.envs.base import EnvironmentOptions
from como_jax.envs.libero import benchmark
from como_jax.envs.registry import environment_names, make_environment
from como_jax.errors import ConfigError

HAS_LIBERO = all(importlib.util.find_spec(name) for name in ("robosuite", "libero"))
needs_libero = pytest.mark.skipif(not HAS_LIBERO, reason=f"LIBERO is not installed ({benchmark.INSTALL})")


def test_suites_are_groups_of_tasks() -> None:
    assert len(environment_names("libero:all")) == 130
    assert len(environment_names("libero:libero_90")) == 90
    assert environment_names("libero:libero_goal/7,libero_10")[:2] == ("libero:libero_goal/7", "libero:libero_10/0")
    with pytest.raises(
        ConfigError, match="libero has no task 'libero_goal/10', only libero_spatial/0, .*; did you mean libero_goal/1?"
    ):
        environment_names("libero:libero_goal/10")
    assert {name.partition("/")[0] for name in benchmark.TASKS} == set(builder.SUITES)


def test_names_of_tasks_say_what_to_do_as_in_converted_datasets() -> None:
    for name in ("KITCHEN_SCENE10_close_the_top_drawer", "put_the_bowl_on_the_stove"):
        assert benchmark.named_instruction(name) == demonstrations.named_instruction(f"{name}_demo.hdf5")


def write_archive(path: Path, content: bytes) -> epath.Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3")
    return epath.Path(path)


@pytest.mark.parametrize("shape", [(50, 79), (1, 3), (300, 2)])
def test_initial_states_are_read(tmp_path: Path, shape: tuple[int, int]) -> None:
    states = np.random.default_rng(0).normal(size=shape)
    path = write_archive(tmp_path / "a.pruned_init", pickle.dumps(states, protocol=2))
    np.testing.assert_array_equal(benchmark.read_init_states(path), states)


class Call:
    """Its pickle calls `print` when it is loaded."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("executed",)


@pytest.mark.parametrize("content", [Call(), np.zeros((2, 3), np.float32), np.zeros((2, 3), ">f8"), [1.0], "text"])
def test_initial_states_of_other_kinds_are_refused_and_not_executed(
    tmp_path: Path, content: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_archive(tmp_path / "a.pruned_init", pickle.dumps(content, protocol=2))
    with pytest.raises(ConfigError, match="a.pruned_init holds no initial states"):
        benchmark.read_init_states(path)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"", b"no archive"])
def test_damaged_initial_states_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = epath.Path(tmp_path / "a.pruned_init")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="a.pruned_init holds no initial states"):
        benchmark.read_init_states(path)
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    path.write_bytes(buffer.getvalue())
    with pytest.raises(ConfigError, match="a.pruned_init holds no initial states"):
        benchmark.read_init_states(path)


@pytest.fixture(scope="module")
def libero_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of LIBERO's config file in this process, which it remembers."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("libero") / "new"
        patch.setenv("LIBERO_CONFIG_PATH", str(folder))
        yield folder


@needs_libero
def test_libero_has_all_tasks_with_instructions_and_initial_states(libero_config: Path) -> None:
    names = benchmark.task_names()
    assert {suite: len(names[suite]) for suite in benchmark.SUITES} == {
        suite: count for suite, (count, _) in benchmark.SUITES.items()
    }
    libero = benchmark.import_libero()
    for suite in benchmark.SUITES:
        for name in names[suite]:
            states = benchmark.read_init_states(
                benchmark._folder(libero, "init_states") / suite / f"{name}.pruned_init"
            )
            # Time, and at least the arm's nine positions and velocities.
            assert states.shape[0] >= 20 and states.shape[1] > 19 and np.isfinite(states).all()
            problem = benchmark._folder(libero, "bddl_files") / suite / f"{name}.bddl"
            assert len(benchmark.problem_instruction(problem).split()) >= 3
    assert benchmark.named_instruction(names["libero_goal"][0]) == "open the middle drawer of the cabinet"
    assert (libero_config / "config.yaml").is_file()


@needs_libero
def test_problem_files_are_read_as_libero_reads_them(libero_config: Path) -> None:
    libero = benchmark.import_libero()
    from libero.libero.envs.bddl_utils import get_problem_info

    for suite, names in benchmark.task_names().items():
        path = benchmark._folder(libero, "bddl_files") / suite / f"{names[0]}.bddl"
        if path.exists():
            assert benchmark.problem_instruction(path) == get_problem_info(str(path))["language_instruction"]


@needs_libero
def test_missing_meshes_are_named_with_the_way_to_get_them(
    libero_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    if all((benchmark._package_folder() / "assets" / name).is_dir() for name in benchmark._MESH_FOLDERS):
        pytest.skip("LIBERO's meshes lie in its package")
    with pytest.raises(
        ConfigError, match=r"hf download lerobot/libero-assets .*name their folder as `assets` in .*new"
    ):
        make_environment("libero:libero_goal/0", EnvironmentOptions())
    with pytest.raises(ConfigError, match="instruction=nam: must be problem or name; did you mean name?"):
        make_environment("libero:libero_goal/0", EnvironmentOptions(settings={"instruction": "nam"}))


BLOCK = """<mujoco model="{name}"><worldbody><body><body name="object">
{geoms}
</body>
<site name="bottom_site" pos="0 0 -0.03" size="0.005" rgba="0 0 0 0"/>
<site name="top_site" pos="0 0 0.03" size="0.005" rgba="0 0 0 0"/>
<site name="horizontal_radius_site" pos="0.03 0.03 0" size="0.005" rgba="0 0 0 0"/>
</body></worldbody></mujoco>"""
GEOM = '<geom type="box" size="{0}" pos="{1}" rgba="{2}" density="100" group="{3}" condim="4"/>'
SITE = '<site name="contain_region" type="box" size="0.07 0.07 0.05" pos="0 0 0.05" quat="1 0 0 0" rgba="0 0 0 0"/>'
ARENA = """<mujoco model="arena"><asset>
<texture name="texplane" type="2d" file="textures/plane.png"/>
<texture name="tex-wall" type="2d" file="textures/wall.png"/>
</asset><worldbody>
<body name="floor"><geom name="floor" type="plane" size="3 3 .1" rgba="0.8 0.8 0.8 1" group="1" condim="3"/></body>
<light pos="1 1 1.5" dir="-0.2 -0.2 -1" directional="true" castshadow="false"/>
<camera mode="fixed" name="frontview" pos="1.6 0 1.45" quat="0.56 0.43 0.43 0.56"/>
<camera mode="fixed" name="agentview" pos="0.5 0 1.35" quat="0.653 0.271 0.271 0.653"/>
</worldbody></mujoco>"""


def write_stand_ins(folder: Path) -> Path:
    """Boxes in place of the meshes of the suite libero_object's first task, so that its scene can be built."""
    for name in benchmark._MESH_FOLDERS:
        (folder / name).mkdir(parents=True)
    (folder / "scenes" / "libero_floor_base_style.xml").write_text(ARENA)
    (folder / "scenes" / "textures").mkdir()
    for texture in ("light-gray-floor-tile.png", "light-gray-plaster.png"):
        cv2.imwrite(str(folder / "scenes" / "textures" / texture), np.full((8, 8, 3), 200, np.uint8))
    for name in ("alphabet_soup", "salad_dressing", "cream_cheese", "milk", "tomato_sauce", "butter"):
        colour = "1 0 0 1" if name == "alphabet_soup" else "0.2 0.5 0.3 1"
        geoms = "".join(GEOM.format("0.02 0.02 0.03", "0 0 0", colour, group) for group in (0, 1))
        (folder / "stable_hope_objects" / name).mkdir()
        (folder / "stable_hope_objects" / name / f"{name}.xml").write_text(BLOCK.format(name=name, geoms=geoms))
    floor = GEOM.format("0.08 0.08 0.005", "0 0 -0.02", "0.6 0.4 0.1 1", 0)
    (folder / "stable_scanned_objects" / "basket").mkdir()
    (folder / "stable_scanned_objects" / "basket" / "basket.xml").write_text(
        BLOCK.format(name="basket", geoms=floor + SITE)
    )
    return folder


def libero_sees(task: str, state: int) -> dict[str, np.ndarray]:
    """What LIBERO's own environment shows after settling, as in its evaluation script."""
    from libero.libero.envs import OffScreenRenderEnv

    libero = benchmark.import_libero()
    suite, _, number = task.partition("/")
    name = benchmark.task_names()[suite][int(number)]
    folders = [epath.Path(libero.get_libero_path(key)) / suite for key in ("bddl_files", "init_states")]
    env = OffScreenRenderEnv(bddl_file_name=str(folders[0] / f"{name}.bddl"), camera_heights=64, camera_widths=64)
    env.seed(state)
    env.reset()
    env.set_init_state(benchmark.read_init_states(folders[1] / f"{name}.pruned_init")[state])
    for _ in range(10):
        observation, *_ = env.step([0, 0, 0, 0, 0, 0, -1.0])
    env.close()
    return observation


@needs_libero
def test_a_task_of_libero_starts_from_its_initial_states_and_is_solved_by_its_own_predicate(
    libero_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libero = benchmark.import_libero()
    places = json.loads((libero_config / "config.yaml").read_text())
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({**places, "assets": str(write_stand_ins(tmp_path / "meshes"))}))
    monkeypatch.setattr(libero, "config_file", str(config))
    monkeypatch.setattr(libero, "_assets_path_cache", None)
    settings = {"render_size": "64", "instruction": "name"}
    env = make_environment("libero:libero_object/0", EnvironmentOptions(settings=settings))
    assert env.instruction == "pick up the alphabet soup and place it in the basket"
    assert env.spec.max_steps == 280 and env.spec.name == "libero:libero_object/0"
    first = env.reset(2)
    expected = libero_sees("libero_object/0", 2)
    for name, own in (("agentview_rgb", "agentview"), ("eye_in_hand_rgb", "robot0_eye_in_hand")):
        np.testing.assert_array_equal(first.images[name], expected[f"{own}_image"][::-1, ::-1])
    np.testing.assert_allclose(first.state[:3], expected["robot0_eef_pos"], atol=1e-6)
    np.testing.assert_allclose(first.state[6:], expected["robot0_gripper_qpos"], atol=1e-6)
    soup, basket = (env._env.objects_dict[name].joints[-1] for name in ("alphabet_soup_1", "basket_1"))
    sim = env._env.sim
    states = env._task.init_states
    start = states[2][1:].copy()
    # Objects stay where the initial state put them, and the arm's joints too, but for settling.
    np.testing.assert_allclose(sim.get_state().flatten()[1:8], start[:7], atol=0.05)
    address = sim.model.get_joint_qpos_addr(soup)[0]
    np.testing.assert_allclose(sim.data.qpos[address : address + 2], start[address : address + 2], atol=0.05)
    again = env.reset(2 + len(states))
    np.testing.assert_array_equal(first.state, env.reset(2).state)
    assert again.state.shape == (8,) and again.images["agentview_rgb"].std() > 1
    still = np.array([0, 0, 0, 0, 0, 0, -1.0])
    assert not env.step(still).success
    sim = env._env.sim
    place = sim.data.get_joint_qpos(basket).copy()
    place[2] += 0.06
    sim.data.set_joint_qpos(soup, place)
    assert env.step(still).success
    env.close()


@needs_libero
@pytest.mark.parametrize("named", [True, False])
def test_nobody_is_asked_and_nothing_is_left_at_home(tmp_path: Path, named: bool) -> None:
    home, folder = tmp_path / "home", tmp_path / "named" / "deep"
    home.mkdir()
    variables = {key: value for key, value in os.environ.items() if key != "LIBERO_CONFIG_PATH"}
    variables |= {"HOME": str(home)} | ({"LIBERO_CONFIG_PATH": str(folder)} if named else {})
    code = "from como_jax.envs.libero import benchmark; print(benchmark.import_libero().libero_config_path)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    used = Path(done.stdout.split()[-1])
    assert not (home / ".libero").exists()
    assert (used == folder and (folder / "config.yaml").is_file()) if named else not used.exists()
