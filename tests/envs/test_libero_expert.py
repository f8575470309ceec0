"""The scripted expert for LIBERO: its order of goals, and its searches for grasps and places in maps made here."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from como_jax.envs.libero import benchmark
from como_jax.envs.libero.expert import arm, grasps
from como_jax.envs.libero.expert.expert import order
from como_jax.envs.libero.expert.heights import HeightMap
from como_jax.envs.libero.simulation import Simulation
from como_jax.errors import UsageError
from tests.everyday import needs_libero
from tools.benchmarks import libero_expert

_CELL = 0.004
_TABLE = 0.9


def _map(side: float = 0.4, height: float = -np.inf) -> HeightMap:
    """A square around the origin, all at one height."""
    count = 2 * round(side / 2 / _CELL) + 1
    return HeightMap(np.full(2, -_CELL * (count // 2)), _CELL, np.full((count, count), height))


def _where(held: HeightMap, chosen, height: float) -> None:
    """Raises the cells whose positions x, y `chosen` picks."""
    ground = held.corner[0] + held.cell * np.arange(len(held.heights))
    x, y = np.meshgrid(ground, ground, indexing="ij")
    held.heights[chosen(x, y)] = height


def _box(half_x: float, half_y: float, height: float = 0.06) -> HeightMap:
    target = _map()
    _where(target, lambda x, y: (abs(x) <= half_x) & (abs(y) <= half_y), _TABLE + height)
    return target


def test_a_box_is_grasped_across_its_short_side_at_its_middle():
    best = grasps.search(_box(0.08, 0.02), _map(height=_TABLE), np.zeros(3))[0]
    # The fingers' axis is the world's y axis at a yaw of 0.
    assert best.yaw == pytest.approx(0.0)
    assert np.linalg.norm(best.point[:2]) < 0.01
    assert _TABLE + 0.06 - 0.027 <= best.point[2] + 1e-9 < _TABLE + 0.06
    turned = grasps.search(_box(0.02, 0.08), _map(height=_TABLE), np.zeros(3))[0]
    assert abs(turned.yaw) == pytest.approx(np.pi / 2)


def test_a_low_box_is_grasped_above_the_table():
    best = grasps.search(_box(0.05, 0.02, height=0.02), _map(height=_TABLE), np.zeros(3))[0]
    assert best.point[2] >= _TABLE + grasps.TIP


def test_what_is_wider_than_the_hand_is_not_grasped():
    assert grasps.search(_box(0.06, 0.06), _map(height=_TABLE), np.zeros(3)) == []
    assert grasps.search(_map(), _map(height=_TABLE), np.zeros(3)) == []


def test_a_bowl_is_grasped_at_its_rim():
    bowl = _map()
    _where(bowl, lambda x, y: np.hypot(x, y) < 0.06, _TABLE + 0.005)
    _where(bowl, lambda x, y: abs(np.hypot(x, y) - 0.057) < 0.004, _TABLE + 0.05)
    best = grasps.search(bowl, _map(height=_TABLE), np.zeros(3))[0]
    assert np.hypot(*best.point[:2]) == pytest.approx(0.057, abs=0.008)
    across = grasps.hand_axes(best.yaw)[0]
    assert abs(across @ best.point[:2]) > 0.9 * np.hypot(*best.point[:2])
    # The fingers above the pads do not touch it.
    assert best.point[2] == pytest.approx(_TABLE + 0.05 - 0.013, abs=0.002)


def test_what_lies_behind_the_hand_is_no_obstacle():
    tops = _map()
    _where(tops, lambda x, y: abs(abs(x) - 0.1) < 0.01, _TABLE + 0.3)
    ahead = arm._ahead(tops, np.zeros(3), np.array([0.15, 0.05, 0]))
    assert ahead.at(np.array([0.1, 0])) == _TABLE + 0.3
    assert ahead.at(np.array([-0.1, 0])) == -np.inf
    still = arm._ahead(tops, np.zeros(3), np.array([0, 0, 0.2]))
    np.testing.assert_array_equal(still.heights, tops.heights)


def test_a_neighbour_keeps_the_fingers_away():
    around = _map(height=_TABLE)
    _where(around, lambda x, y: (y > 0.05) & (y < 0.1), _TABLE + 0.2)
    found = grasps.search(_box(0.02, 0.02), around, np.zeros(3))
    assert found and all(abs(abs(grasp.yaw) - np.pi / 2) < 0.4 for grasp in found)


def test_nothing_else_is_grasped_with_the_object():
    around = _map(height=_TABLE)
    # A wall beside the box, thinner than the gap between the fingers.
    _where(around, lambda x, y: abs(y - 0.028) < 0.003, _TABLE + 0.055)
    best = grasps.search(_box(0.08, 0.02), around, np.zeros(3))
    assert all(abs(grasp.yaw) > 0.5 or grasp.point[2] > _TABLE + 0.055 + grasps.TIP for grasp in best)


def test_the_hand_stays_above_what_is_under_its_palm():
    around = _map(height=_TABLE)
    _where(around, lambda x, y: y > 0.085, _TABLE + 0.2)
    low = grasps.clear_height(_map(height=_TABLE), np.zeros((1, 2)), 0.0)
    assert low[0] == pytest.approx(_TABLE + grasps.TIP, abs=0.005)
    assert grasps.clear_height(around, np.zeros((1, 2)), 0.0)[0] > _TABLE + 0.2 - grasps.PALM
    assert grasps.clear_height(around, np.zeros((1, 2)), np.pi / 2)[0] == pytest.approx(low[0])


def _underside(half: float) -> np.ndarray:
    side = np.linspace(-half, half, 9)
    return np.array([(x, y, -0.03) for x in side for y in side])


def test_a_place_is_free_and_near_the_wish():
    around = _map(height=_TABLE)
    spot = grasps.find_spots(around, _underside(0.03), np.array([0, 0, _TABLE]), np.full(3, 0.1))[0]
    assert np.hypot(*spot.point[:2]) < 0.01 and spot.point[2] == pytest.approx(_TABLE + 0.03)
    _where(around, lambda x, y: x > -0.01, _TABLE + 0.05)
    spot = grasps.find_spots(around, _underside(0.03), np.array([0, 0, _TABLE]), np.full(3, 0.1))[0]
    assert spot.point[0] < -0.035 and spot.point[2] == pytest.approx(_TABLE + 0.03)


def test_a_place_that_is_too_high_is_none():
    around = _map(height=_TABLE + 0.5)
    assert grasps.find_spots(around, _underside(0.03), np.array([0, 0, _TABLE]), np.full(3, 0.1)) == []


def test_a_narrow_place_is_entered_turned():
    around = _map(height=_TABLE + 0.05)
    _where(around, lambda x, y: (abs(x) < 0.02) & (abs(y) < 0.07), _TABLE)
    long = np.array([(x, y, -0.05) for x in np.linspace(-0.06, 0.06, 13) for y in (-0.01, 0, 0.01)])
    spot = grasps.find_spots(
        around, long, np.array([0, 0, _TABLE + 0.05]), np.array([0.02, 0.07, 0.06]), turns=(0.0, np.pi / 2)
    )[0]
    assert spot.turn == pytest.approx(np.pi / 2) and spot.point[2] == pytest.approx(_TABLE + 0.05)


def test_what_would_stand_too_low_leans_on_the_wall():
    around = _map(height=_TABLE + 0.085)
    _where(around, lambda x, y: (abs(x) < 0.03) & (abs(y) < 0.07), _TABLE)
    # A book of 28 mm, in a compartment of 60 mm whose goal holds from 1 mm above the floor.
    book = np.array(
        [
            (x, y, z)
            for x in np.linspace(-0.014, 0.014, 8)
            for y in np.linspace(-0.055, 0.055, 27)
            for z in (0, 0.04, 0.08, 0.13)
        ]
    )
    centre, half = np.array([0, 0, _TABLE + 0.061]), np.array([0.03, 0.07, 0.06])
    upright = grasps.find_spots(around, book[::4], centre, half)
    assert all(spot.point[2] > _TABLE + 0.08 for spot in upright)
    best = grasps.find_leaning_spots(around, book, centre, half)[0]
    lean = best.lean.as_rotvec()
    assert abs(lean[1]) > 0.2 and abs(lean[0]) < 1e-6
    assert best.point[2] > _TABLE + 0.001
    # Its top is on the side of the wall that it leans on, its foot at the other wall.
    assert best.point[0] * lean[1] < 0


def test_a_leaning_hand_is_clear_of_a_wall_beside_it():
    around = _map(height=_TABLE)
    _where(around, lambda x, y: (y > 0.045) & (y < 0.05), _TABLE + 0.1)
    upright = grasps.clear_height(around, np.zeros((1, 2)), 0.0)[0]
    away = grasps.clear_height(around, np.zeros((1, 2)), 0.0, lean=Rotation.from_rotvec([0.4, 0, 0]))[0]
    toward = grasps.clear_height(around, np.zeros((1, 2)), 0.0, lean=Rotation.from_rotvec([-0.4, 0, 0]))[0]
    assert away < upright < toward


@pytest.mark.parametrize(
    ("goals", "first_to_last"),
    [
        (
            [("close", "cabinet_bottom"), ("in", "bowl", "cabinet_bottom")],
            [("in", "bowl", "cabinet_bottom"), ("close", "cabinet_bottom")],
        ),
        (
            [("in", "mug", "microwave_heating_region"), ("close", "microwave")],
            [("in", "mug", "microwave_heating_region"), ("close", "microwave")],
        ),
        (
            [("open", "cabinet_top"), ("close", "cabinet_bottom")],
            [("close", "cabinet_bottom"), ("open", "cabinet_top")],
        ),
        (
            [("on", "pot", "stove_cook_region"), ("turnon", "stove")],
            [("turnon", "stove"), ("on", "pot", "stove_cook_region")],
        ),
        (
            [("on", "bowl_1", "bowl_2"), ("in", "bowl_2", "tray")],
            [("in", "bowl_2", "tray"), ("on", "bowl_1", "bowl_2")],
        ),
    ],
)
def test_goals_are_pursued_in_an_order_that_works(goals, first_to_last):
    assert order(goals) == first_to_last


@pytest.mark.slow
@needs_libero
@pytest.mark.parametrize(
    "task",
    [
        "libero_object/7",  # Into a basket.
        "libero_spatial/2",  # By its rim.
        "libero_goal/0",  # A drawer is opened.
        "libero_goal/2",  # Onto a high place.
        "libero_goal/7",  # A knob is turned.
        "libero_goal/9",  # Laid down.
        "libero_10/1",  # Two objects.
        "libero_10/2",  # A knob, then a pot onto the fire.
        "libero_90/0",  # A drawer is shut.
        "libero_90/33",  # A door is shut.
    ],
)
def test_real_tasks_are_solved_and_stay_solved(task):
    simulation = Simulation(benchmark.load(task))
    line = libero_expert.episode(simulation, state=0, noise=0.0)
    simulation.close()
    assert line["solved_after"], line


def test_the_table_counts_by_task_and_suite():
    line = dict.fromkeys(libero_expert._COLUMNS, "")
    lines = [
        line | {"task": "libero:libero_goal/10", "solved_after": "100", "first_true_after": "80"},
        line | {"task": "libero:libero_goal/2", "solved_after": "", "first_true_after": "90"},
        line | {"task": "libero:libero_goal/2", "solved_after": "140", "first_true_after": "90"},
    ]
    assert libero_expert.table(lines).splitlines()[2:] == [
        "| libero:libero_goal | 3 | 2 (67 %, 21-94) | 3 | 120 |",
        "| libero:libero_goal/2 | 2 | 1 (50 %) | 2 | 140 |",
        "| libero:libero_goal/10 | 1 | 1 (100 %) | 1 | 100 |",
    ]


@pytest.mark.parametrize(("text", "numbers"), [("0-3", [0, 1, 2, 3]), ("7", [7]), ("0-1,5", [0, 1, 5])])
def test_numbers_are_read(text, numbers):
    assert libero_expert._numbers(text) == numbers


@pytest.mark.parametrize("text", ["", "a", "1-", "1-2-3", "1,,2"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(UsageError, match="no numbers"):
        libero_expert._numbers(text)
