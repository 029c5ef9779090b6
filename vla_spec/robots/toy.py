"""A point mass with a gripper in a box, drawn by numpy: a robot for tests and examples that needs no simulator.

State: x, y, z in [-1, 1] and gripper opening in [0, 1]. Action: 4 numbers in [-1, 1], three position increments of at
most `SPEED` per step and where the gripper should go (-1 closed, 1 open). The task: be near the goal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt

from vla_spec.errors import BadConfig, BadObservation
from vla_spec.plugins import Parts
from vla_spec.types import Float32, Observation, UInt8

SPEED = 0.05  # box units per step at action 1
GRIPPER_RATE = 0.25  # share of the way that the gripper goes in one step
GOAL_RADIUS = 0.1
NUM_CAMERAS = 3
#: Which two coordinates each camera sees: from above, from the front, from the side.
_VIEWS = ((0, 1), (0, 2), (1, 2))


@dataclass(frozen=True, slots=True)
class Options:
    """What a configuration may set.

    Attributes:
        image_size: pictures are image_size x image_size, at least 4.
        instruction: the words in every observation.
        dt_s: control period [s].
    """

    image_size: int = 16
    instruction: str = "go to the goal"
    dt_s: float = 0.0125

    def __post_init__(self) -> None:
        if self.image_size < 4 or self.dt_s <= 0:
            raise BadConfig(f"toy robot: image_size {self.image_size} must be 4 or more, dt_s {self.dt_s} more than 0")


@final
class ToyRobot:
    """One point mass. Not thread-safe."""

    num_cameras = NUM_CAMERAS

    def __init__(self, options: Options | None = None) -> None:
        options = options or Options()
        self.image_size, self.instruction, self.dt_s = options.image_size, options.instruction, options.dt_s
        self.action_low, self.action_high = np.full(4, -1, np.float32), np.full(4, 1, np.float32)
        self.reset(0)

    def reset(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._position = rng.uniform(-0.8, 0.8, 3)
        self.goal = rng.uniform(-0.8, 0.8, 3)
        self._opening = 1.0
        self.step, self.is_success = 0, False

    @property
    def state(self) -> Float32:
        """Float32 [4]: x, y, z, gripper opening."""
        return np.array([*self._position, self._opening], np.float32)

    def render(self) -> UInt8:
        """Uint8 [3, size, size, 3]: the mass in red, the goal in green, the opening as blue."""
        pictures = np.zeros((NUM_CAMERAS, self.image_size, self.image_size, 3), np.uint8)
        pictures[..., 2] = round(255 * self._opening)
        for picture, (across, up) in zip(pictures, _VIEWS, strict=True):
            for channel, point in ((1, self.goal), (0, self._position)):
                row, column = self._pixel(point[up]), self._pixel(point[across])
                picture[row : row + 2, column : column + 2, channel] = 255
        return pictures

    def observe(self, now_ns: int) -> Observation:
        return Observation(self.render(), self.state, self.instruction, now_ns, self.step)

    def act(self, action: Float32, now_ns: int) -> Float32:
        if not np.isfinite(action).all():
            raise BadObservation("action", f"not finite: {action}", "numbers in [-1, 1]")
        sent = np.clip(action, self.action_low, self.action_high).astype(np.float32)
        self._position = np.clip(self._position + SPEED * sent[:3], -1, 1)
        self._opening += GRIPPER_RATE * ((float(sent[3]) + 1) / 2 - self._opening)
        self.step += 1
        self.is_success = self.is_success or float(np.linalg.norm(self._position - self.goal)) < GOAL_RADIUS
        return sent

    @property
    def physics(self) -> npt.NDArray[np.float64]:
        """float64 [4], all that moves; another robot that was reset with the same seed can `show` it."""
        return np.array([*self._position, self._opening], np.float64)

    def show(self, physics: npt.NDArray[np.float64]) -> None:
        """Take over `physics`, for drawing.

        Raises:
            BadObservation: not four finite numbers.
        """
        if physics.shape != (4,) or not np.isfinite(physics).all():
            raise BadObservation("physics", f"{list(physics.shape)}", "4 finite numbers")
        self._position, self._opening = physics[:3].copy(), float(physics[3])

    def expert_action(self) -> Float32:
        """Straight to the goal, gripper open; float32 [4]."""
        towards = (self.goal - self._position) / SPEED  # [3]
        return np.array([*np.clip(towards, -1, 1), 1], np.float32)

    def close(self) -> None:
        """Nothing to free."""

    def _pixel(self, coordinate: float) -> int:
        return int((coordinate + 1) / 2 * (self.image_size - 2))


def build(options: Options, parts: Parts | None = None) -> ToyRobot:
    """A robot needs no other part."""
    return ToyRobot(options)
