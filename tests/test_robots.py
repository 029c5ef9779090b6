import importlib.util
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from vla_spec import plugins
from vla_spec.errors import BadConfig, BadObservation, MissingDependency
from vla_spec.interfaces import Robot
from vla_spec.robots import _gl, replay, toy


def record(path, n=3, **changes):
    images = np.zeros((n, 2, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0, 0] = np.arange(n)
    arrays = {"images": images, "state": np.arange(4 * n).reshape(n, 4) / 10} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return replay.ReplayRobot(replay.Options(path=str(path)))


def frame(observation):
    return int(observation.images[0, 0, 0, 0])


def test_toy_is_a_robot_and_a_plugin():
    plugin = plugins.load("robot", "toy")
    robot = plugin.build(plugin.options(image_size=12), None)
    assert isinstance(robot, Robot)
    seen = robot.observe(7)
    assert (seen.images.dtype, seen.images.shape) == (np.uint8, (3, 12, 12, 3))
    assert (seen.state.dtype, seen.state.shape, seen.stamp_ns, seen.step) == (np.float32, (4,), 7, 0)


def test_toy_episodes_repeat_from_a_seed():
    one, other = toy.ToyRobot(), toy.ToyRobot()
    one.reset(4)
    other.reset(4)
    for _ in range(5):
        action = one.expert_action()
        np.testing.assert_array_equal(one.act(action, 0), other.act(action, 0))
    np.testing.assert_array_equal(one.observe(0).images, other.observe(0).images)
    other.reset(5)
    assert (one.state != other.state).any()


def test_toy_expert_solves_every_episode():
    robot = toy.ToyRobot()
    for seed in range(20):
        robot.reset(seed)
        for _ in range(60):
            robot.act(robot.expert_action(), 0)
        assert robot.is_success
        assert robot.step == 60


def test_toy_clips_actions_and_says_what_it_sent():
    robot = toy.ToyRobot()
    before = robot.state
    assert robot.act(np.array([9, -9, 0, 1], np.float32), 0).tolist() == [1, -1, 0, 1]
    assert abs(robot.state - before)[:3].max() == pytest.approx(toy.SPEED, abs=1e-6)
    with pytest.raises(BadObservation, match="not finite"):
        robot.act(np.full(4, np.nan, np.float32), 0)


def test_toy_shows_what_another_one_looks_like():
    moved, shown = toy.ToyRobot(), toy.ToyRobot()
    for robot in (moved, shown):
        robot.reset(5)
    for _ in range(9):
        moved.act(moved.expert_action(), 0)
    assert not np.array_equal(shown.render(), moved.render())
    shown.show(moved.physics)
    np.testing.assert_array_equal(shown.render(), moved.render())
    for wrong in (np.zeros(3), np.full(4, np.nan)):
        with pytest.raises(BadObservation, match="physics"):
            shown.show(wrong)


def test_toy_pictures_show_where_the_mass_is():
    robot = toy.ToyRobot()
    first = robot.render()
    for _ in range(10):
        robot.act(np.array([-1, 1, 1, -1], np.float32), 0)
    second = robot.render()
    assert (first[..., 0] != second[..., 0]).any()
    assert (first[..., 1] == second[..., 1]).all()  # the goal stays
    assert second[0, 0, 0, 2] < first[0, 0, 0, 2]  # the gripper has closed


def test_replay_plays_what_was_seen_last_and_records_what_it_is_told(tmp_path):
    robot = record(tmp_path / "a.npz", instruction="open")
    assert isinstance(robot, Robot)
    assert (robot.instruction, robot.num_steps) == ("open", 3)
    frames = []
    for step in range(5):
        seen = robot.observe(10 * step)
        assert (seen.step, seen.stamp_ns) == (step, 10 * step)
        frames.append(frame(seen))
        robot.act(np.full(4, step - 1, np.float32), 10 * step)
    assert frames == [0, 1, 2, 2, 2]  # its last one behind its end
    assert robot.commands[:, 0].tolist() == [-1, 0, 1, 1, 1]
    robot.save_commands(tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as saved:
        assert saved["commands"].shape == (5, 4)
        assert saved["stamp_ns"].tolist() == [0, 10, 20, 30, 40]
    robot.reset(0)
    assert robot.commands.shape == (0, 4)


def test_replay_knows_pictures_that_were_not_taken_at_every_step(tmp_path):
    robot = record(tmp_path / "a.npz", steps=np.array([0, 2, 4]), state=np.arange(24).reshape(6, 4))
    seen = []
    for _ in range(7):
        observation = robot.observe(0)
        seen.append((frame(observation), int(observation.state[0])))
        robot.act(np.zeros(4, np.float32), 0)
    assert seen == [(0, 0), (0, 4), (1, 8), (1, 12), (2, 16), (2, 20), (2, 20)]
    assert robot.num_steps == 6


def test_replay_takes_limits_and_rate_from_the_recording(tmp_path):
    robot = record(tmp_path / "a.npz", action_low=np.zeros(2), action_high=np.ones(2), dt_s=0.05)
    assert (robot.dt_s, robot.action_high.tolist()) == (0.05, [1, 1])
    assert robot.act(np.array([-3, 3], np.float32), 0).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": None}, r"lacks \['state'\]"),
        ({"images": np.zeros((3, 2, 4, 4, 3))}, "images are float64"),
        ({"images": np.zeros((0, 2, 4, 4, 3), np.uint8)}, "n from 1"),
        ({"state": np.zeros((2, 4))}, "2 states"),
        ({"steps": np.array([1, 2, 3])}, "ascend from 0"),
        ({"steps": np.array([0, 2, 2])}, "ascend from 0"),
        ({"state": np.array([{}, {}, {}], object)}, "plain arrays"),
    ],
)
def test_recordings_that_are_wrong_are_refused(tmp_path, changes, message):
    with pytest.raises(BadConfig, match=message):
        record(tmp_path / "a.npz", **changes)


def test_files_that_are_no_recordings_are_refused(tmp_path):
    with pytest.raises(BadConfig, match="no such file"):
        replay.build(replay.Options(path=str(tmp_path / "none.npz")))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(BadConfig, match="plain arrays"):
        replay.build(replay.Options(path=str(tmp_path / "text.npz")))
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(BadConfig):
        replay.build(replay.Options(path=str(tmp_path / "one.npy")))


@pytest.fixture
def no_choice(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delitem(_gl.sys.modules, "mujoco", raising=False)
    _gl._first_that_works.cache_clear()
    yield monkeypatch
    _gl._first_that_works.cache_clear()


def test_rendering_falls_back_to_osmesa_and_asks_once(no_choice):
    asked = []

    def probe(backend):
        asked.append(backend)
        return "no display" if backend == "egl" else ""

    no_choice.setattr(_gl, "probe", probe)
    assert _gl.select_gl_backend() == "osmesa"
    assert _gl.os.environ["MUJOCO_GL"] == "osmesa"
    no_choice.delenv("MUJOCO_GL")
    assert _gl.select_gl_backend() == "osmesa"
    assert asked == ["egl", "osmesa"]


def test_without_any_backend_it_says_what_each_one_answered_and_what_to_install(no_choice):
    no_choice.setattr(_gl, "probe", lambda backend: f"no {backend} here")
    with pytest.raises(MissingDependency, match=r"egl: no egl here; osmesa: no osmesa here.*apt-get install"):
        _gl.select_gl_backend()


def test_the_users_choice_is_not_questioned(no_choice):
    no_choice.setenv("MUJOCO_GL", "glfw")
    no_choice.setattr(_gl, "probe", lambda backend: pytest.fail("asked"))
    assert _gl.select_gl_backend() == "glfw"


def test_mujoco_imported_too_early_without_a_screen_is_told_so(no_choice):
    no_choice.setitem(_gl.sys.modules, "mujoco", SimpleNamespace())
    no_choice.setattr(_gl.sys, "platform", "linux")
    no_choice.delenv("WAYLAND_DISPLAY", raising=False)
    no_choice.setenv("DISPLAY", ":0")
    assert _gl.select_gl_backend() == "as imported"
    no_choice.delenv("DISPLAY")
    with pytest.raises(BadConfig, match="set MUJOCO_GL=egl"):
        _gl.select_gl_backend()


def test_a_probe_gives_the_last_line_of_what_went_wrong(monkeypatch):
    def run(*args, **kwargs):
        return SimpleNamespace(returncode=1, stderr="Traceback\nImportError: no EGL device\n")

    monkeypatch.setattr(_gl.subprocess, "run", run)
    assert _gl.probe("egl") == "ImportError: no EGL device"

    def hang(*args, **kwargs):
        raise subprocess.TimeoutExpired("python", 60)

    monkeypatch.setattr(_gl.subprocess, "run", hang)
    assert "timed out" in _gl.probe("egl")


@pytest.mark.slow
def test_metaworld_draws_for_another_one_what_that_would_draw():
    """A camera's process has the same world, reset with the same seed, and is told what moves."""
    pytest.importorskip("metaworld")
    from vla_spec.robots.metaworld import MetaWorldRobot

    moved, shown = MetaWorldRobot("drawer-close"), MetaWorldRobot("drawer-close")
    try:
        for robot in (moved, shown):
            robot.reset(10_000)
        for _ in range(12):
            moved.act(moved.expert_action(), 0)
        wanted = moved.render()
        assert np.abs(shown.render().astype(int) - wanted).max() > 50
        shown.show(moved.physics)
        np.testing.assert_array_equal(shown.render(), wanted)
        with pytest.raises(BadObservation, match="task drawer-close"):
            shown.show(np.zeros(3))
    finally:
        moved.close()
        shown.close()


@pytest.mark.slow
def test_metaworld_is_a_robot_and_a_plugin():
    if importlib.util.find_spec("metaworld") is None:
        pytest.skip("metaworld is not installed")
    plugin = plugins.load("robot", "metaworld")
    robot = plugin.build(plugin.options(task="drawer-open", image_size=32), None)
    robot.reset(3)
    assert isinstance(robot, Robot)
    assert robot.observe(5).images.shape == (3, 32, 32, 3)
    assert robot.act(np.full(4, 2, np.float32), 0).tolist() == [1, 1, 1, 1]
    assert robot.observe(5).step == 1
    robot.close()
