"""Actions as joints: names, units and times, so that a chunk is a trajectory that a stock controller understands.

No ROS in here. An action of this project belongs to one control step; a trajectory says where each joint is at which
time and how fast it moves. By kind of the degree of freedom (`DofKind`):

  DELTA     velocity = action * unit / dt; position = where the arm was when it was observed, plus the increments
  VELOCITY  velocity = action * unit;      position likewise
  POSITION  position = action * unit;      velocity = difference to the row before
  SWITCH    position = action;             velocity = 0

Action i acts during control step i, so row i is where the joint is at its end: (i + 1) * dt after the observation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vla_spec.action_space import DofKind
from vla_spec.errors import BadConfig
from vla_spec.types import Float32

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ActionLayout:
    """One robot's joints.

    Attributes:
        joints: A names, in the order of the action.
        kinds: what each number of an action asks for.
        units: float64 [A], joint units (m, rad) per action unit; for VELOCITY per second.
        dt_s: control period [s].

    Raises:
        BadConfig: lengths that differ, names that repeat, a unit or period that is not positive.
    """

    joints: tuple[str, ...]
    kinds: tuple[DofKind, ...]
    units: tuple[float, ...]
    dt_s: float

    def __post_init__(self) -> None:
        if not len(self.joints) == len(self.kinds) == len(self.units):
            raise BadConfig(
                f"action layout: {len(self.joints)} joints, {len(self.kinds)} kinds, {len(self.units)} units; valid: "
                f"the same number of each"
            )
        if len(set(self.joints)) != len(self.joints) or not all(self.joints):
            raise BadConfig(f"action layout: joints are {list(self.joints)}; valid: names that differ")
        if not all(np.isfinite(u) and u > 0 for u in self.units) or not (np.isfinite(self.dt_s) and self.dt_s > 0):
            raise BadConfig(f"action layout: units are {list(self.units)}, dt_s {self.dt_s}; valid: more than 0")

    @property
    def size(self) -> int:
        """A."""
        return len(self.joints)

    def times_s(self, num_rows: int) -> Float64:
        """When each row is reached, float64 [h], counted from the observation [s]."""
        return np.arange(1, num_rows + 1, dtype=np.float64) * self.dt_s

    def to_joints(self, actions: Float32, start: Sequence[float] | None = None) -> tuple[Float64, Float64]:
        """Positions and velocities, float64 [h, A] each, of actions [h, A].

        ``start``: joint positions at the observation, [A]; None = 0, positions are then relative to it.
        """
        values = actions.astype(np.float64)
        units = np.array(self.units)
        delta, speed, place, switch = (
            np.array([kind is wanted for kind in self.kinds])
            for wanted in (DofKind.DELTA, DofKind.VELOCITY, DofKind.POSITION, DofKind.SWITCH)
        )
        velocities = np.where(delta, values * units / self.dt_s, np.where(speed, values * units, 0.0))
        origin = np.zeros(self.size) if start is None else np.asarray(start, np.float64)
        positions = origin + np.cumsum(velocities * self.dt_s, 0)
        targets = np.where(place, values * units, values)
        positions = np.where(place | switch, targets, positions)
        before = np.vstack((np.where(place, origin, 0.0)[None], positions[:-1]))
        if start is None and len(positions):
            before[0] = positions[0]
        speeds: Float64 = np.where(place, (positions - before) / self.dt_s, velocities)
        return positions.astype(np.float64), speeds.astype(np.float64)

    def to_actions(self, positions: Float64, velocities: Float64) -> Float32:
        """Inverse of `to_joints`, float32 [h, A]: what a trajectory was made from, to the last bit."""
        units = np.array(self.units)
        columns = []
        for i, kind in enumerate(self.kinds):
            match kind:
                case DofKind.DELTA:
                    columns.append(velocities[:, i] * self.dt_s / units[i])
                case DofKind.VELOCITY:
                    columns.append(velocities[:, i] / units[i])
                case DofKind.POSITION:
                    columns.append(positions[:, i] / units[i])
                case DofKind.SWITCH:
                    columns.append(positions[:, i])
        return np.stack(columns, 1).astype(np.float32)
