"""Meta-World's simulated Sawyer arm with three cameras: real physics (MuJoCo), real rendered pictures, no object state.

What the policy gets is what a robot has: pictures, an instruction, gripper position and opening. Scripted experts and
success flags are for collection and scoring only. Not thread-safe: one OpenGL context, one owner.
Source: Meta-World, Yu et al. 2019, arXiv:1910.10897.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import numpy.typing as npt

from vla_spec.errors import BadObservation, UnknownOption
from vla_spec.plugins import Parts
from vla_spec.robots._gl import select_gl_backend
from vla_spec.robots._metaworld_tasks import TASKS
from vla_spec.types import Float32, Observation, UInt8

Float64 = npt.NDArray[np.float64]

#: Free cameras that look at the workspace from behind the arm, right and left (azimuth [deg]); closer than the
#: library's own, so that an object covers about twice the pixels. The third one is the library's wrist camera.
SIDE_AZIMUTHS_DEG = (150.0, 30.0)
WRIST_CAMERA = "gripperPOV"


@dataclass(frozen=True, slots=True)
class Options:
    """What a configuration may set.

    Attributes:
        task: a name in `TASKS`.
        image_size: pictures are image_size x image_size.
        instruction: the words in every observation; None = the task's held-out sentence.
    """

    task: str = "drawer-open"
    image_size: int = 96
    instruction: str | None = None


@final
class MetaWorldRobot:
    """One arm that is asked for one task at a time.

    Args:
        task: a name in `TASKS`.
        image_size: pictures are image_size x image_size.
        instruction: the words in every observation; None = the task's held-out sentence.

    Raises:
        UnknownOption: no such task.
        MissingDependency: no OpenGL for rendering; says what to install.
    """

    num_cameras = 3
    dt_s = 0.0125  # 5 physics steps of 2.5 ms

    def __init__(self, task: str = "drawer-open", image_size: int = 96, instruction: str | None = None) -> None:
        if task not in TASKS:
            raise UnknownOption("task", task, TASKS)
        self.task = task
        self.instruction = TASKS[task].held_out if instruction is None else instruction
        self.image_size = image_size
        self.action_low = np.full(4, -1, np.float32)
        self.action_high = np.full(4, 1, np.float32)
        select_gl_backend()
        import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as environments
        from metaworld.policies import ENV_POLICY_MAP as experts

        name = TASKS[task].environment
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._env: Any = environments[f"{name}-goal-observable"](seed=0)
        self._env._freeze_rand_vec, self._env.seeded_rand_vec = False, True
        self._env.max_path_length = 10**9  # the episode's length is the caller's business
        self._expert = experts[name]()
        model = self._env.model
        model.vis.quality.offsamples = 0  # 5 ms a picture instead of 100 with software rendering
        self._renderer = mujoco.Renderer(model, image_size, image_size)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0
        self._cameras: list[Any] = []
        for azimuth in SIDE_AZIMUTHS_DEG:
            camera = mujoco.MjvCamera()
            camera.type = mujoco.mjtCamera.mjCAMERA_FREE
            camera.azimuth, camera.elevation, camera.distance = azimuth, -25.0, 1.05
            camera.lookat[:] = 0.0, 0.68, 0.12
            self._cameras.append(camera)
        self._cameras.append(WRIST_CAMERA)
        self._obs = np.zeros(39)
        self.step, self.is_success = 0, False

    def reset(self, seed: int) -> None:
        """Start an episode; the same seed gives the same episode."""
        self._env.seed(seed)
        self._obs, _ = self._env.reset()
        self.step, self.is_success = 0, False

    def render(self) -> UInt8:
        """uint8 [3, size, size, 3]: from the arm's right side, from its left side, from the wrist."""
        pictures = np.empty((self.num_cameras, self.image_size, self.image_size, 3), np.uint8)
        for i, camera in enumerate(self._cameras):
            self._renderer.update_scene(self._env.data, camera=camera)
            self._renderer.render(out=pictures[i])
        return pictures

    @property
    def state(self) -> Float32:
        """float32 [4]: gripper x, y, z [m] and opening [0..1]."""
        return self._obs[:4].astype(np.float32)

    def observe(self, now_ns: int) -> Observation:
        """Look. The stamp is ``now_ns``."""
        return Observation(self.render(), self.state, self.instruction, now_ns, self.step)

    def act(self, action: Float32, now_ns: int) -> Float32:
        """Do one control step of 12.5 ms; returns the action after clipping to [-1, 1]."""
        if not np.isfinite(action).all():
            raise BadObservation("action", f"not finite: {action}", "numbers in [-1, 1]")
        sent = np.clip(action, self.action_low, self.action_high).astype(np.float32)
        self._obs, _, _, _, info = self._env.step(sent)
        self.step += 1
        self.is_success = self.is_success or bool(info["success"])
        return sent

    @property
    def physics(self) -> Float64:
        """float64 [n], all that moves; another robot that was reset with the same seed can `show` it."""
        import mujoco

        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(self._env.model, kind))
        mujoco.mj_getState(self._env.model, self._env.data, state, kind)
        return state

    def show(self, physics: Float64) -> None:
        """Take over `physics`, for drawing: the pictures are those that the other robot would draw.

        Raises:
            BadObservation: of another task, or not finite.
        """
        import mujoco

        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        size = mujoco.mj_stateSize(self._env.model, kind)
        if physics.shape != (size,) or not np.isfinite(physics).all():
            raise BadObservation("physics", f"{list(physics.shape)}", f"{size} finite numbers, of task {self.task}")
        mujoco.mj_setState(self._env.model, self._env.data, physics, kind)
        mujoco.mj_forward(self._env.model, self._env.data)

    def expert_action(self) -> Float32:
        """What Meta-World's scripted expert would do now; it sees the object positions. float32 [4]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns at every saturated action
            action = self._expert.get_action(self._obs)
        clipped: Float32 = np.clip(action, -1, 1).astype(np.float32)
        return clipped

    def close(self) -> None:
        """Free the OpenGL context and the physics."""
        self._renderer.close()
        self._env.close()


def build(options: Options, parts: Parts | None = None) -> MetaWorldRobot:
    """A robot needs no other part."""
    return MetaWorldRobot(options.task, options.image_size, options.instruction)
