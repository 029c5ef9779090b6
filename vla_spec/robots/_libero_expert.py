"""A scripted expert that picks an object and puts it into a container, for a Panda arm with delta-pose control.

It sees what no policy sees: object poses and shapes. Memoryless, a pure function of the scene, so that it can also
label what another policy did (DAgger). Phases follow from the scene: above the object, down, close, up, across, open.
Actions follow robosuite's OSC_POSE controller (Zhu et al. 2020, arXiv:2009.12293): fractions of 0.05 m and 0.5 rad per
control step, then the gripper, -1 = open, +1 = close.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vla_spec.types import Float32

Float64 = npt.NDArray[np.float64]

OPEN, CLOSE = -1.0, 1.0
#: What an action of 1 means in one control step. [m, rad]
FULL_STEP_M, FULL_STEP_RAD = 0.05, 0.5
#: Fraction of the remaining distance that one step asks for. More overshoots, since the controller's spring is slow.
GAIN = 0.5
#: How far the finger tips reach below the highest point of an object: further down the palm would touch it. [m]
REACH_M = 0.028
#: Room between finger tips and the lowest point of the object, so that they do not press on the ground. [m]
GROUND_M = 0.008
#: Room above what is to be passed over. [m]
CLEARANCE_M = 0.06
#: The fingers' widest opening, less a little on both sides. [m]
WIDEST_M = 0.076
#: How exact the hand must stand above the object before it goes down, and at the object before it closes. [m, rad]
ABOVE_M, AT_M, ALIGNED_RAD = 0.015, 0.012, 0.12
#: Angles that are tried for the fingers. Opposite ones are the same grasp.
NUM_ANGLES = 36
#: How much wider a grasp may be to spare a turn of the hand. [m/rad]
TURN_COST = 0.004


class Grasp(NamedTuple):
    """Where to take an object from above."""

    center: Float64  # [3] between the finger tips, world [m]
    turn: float  # from the hand's present angle to the grasp's, about the vertical [rad], within +-pi/2
    width: float  # of the object between the fingers [m]


class Scene(NamedTuple):
    """What the expert looks at. World coordinates, z up [m]."""

    hand: Float64  # [3] between the finger tips
    finger_axis: Float64  # [2] horizontal direction in which the fingers close, unit length
    object: Float64  # [n, 3] points that span the object
    container: Float64  # [3] middle of the container's opening
    is_held: bool  # both fingers touch the object
    is_placed: bool  # the object is where it belongs
    tilt: Float64  # [2] rotation about world x and y that would make the hand point straight down [rad]


def plan_grasp(points: Float64, finger_axis: Float64) -> Grasp:
    """The narrowest way to take an object from above; of similar ones the one with the least turn.

    Args:
        points: [n, 3] points that span the object, world [m].
        finger_axis: [2] horizontal direction in which the fingers close now.
    """
    turns = (np.arange(NUM_ANGLES) / NUM_ANGLES - 0.5) * np.pi  # [angles]
    now = np.arctan2(finger_axis[1], finger_axis[0])
    axes = np.stack([np.cos(now + turns), np.sin(now + turns)])  # [2, angles]
    along = points[:, :2] @ axes  # [n, angles]
    widths = np.ptp(along, axis=0)
    best = int(np.argmin(widths + TURN_COST * np.abs(turns)))
    axis, across = axes[:, best], np.array([-axes[1, best], axes[0, best]])
    beside = points[:, :2] @ across
    middle = axis * _middle(along[:, best]) + across * _middle(beside)
    low, high = points[:, 2].min(), points[:, 2].max()
    height = max(high - REACH_M, low + GROUND_M)
    return Grasp(np.array([*middle, height]), float(turns[best]), float(widths[best]))


def expert_action(scene: Scene) -> Float32:
    """The next action, float32 [7], robosuite's convention, within [-1, 1]."""
    low, high = scene.object[:, 2].min(), scene.object[:, 2].max()
    if scene.is_placed:
        return _towards(scene, scene.hand + (0, 0, CLEARANCE_M), 0.0, OPEN)
    middle = (scene.object.min(axis=0) + scene.object.max(axis=0)) / 2
    across = scene.container[:2] - middle[:2]
    if np.hypot(*across) < ABOVE_M and low > scene.container[2]:
        # Let go, whether it is still held or not: asking again for a touch that opening ends would close in turn.
        return _towards(scene, scene.hand, 0.0, OPEN)
    if scene.is_held:
        # The object hangs in the hand: what counts is where its lowest point and its middle are.
        lift = scene.container[2] + CLEARANCE_M - low
        if lift > CLEARANCE_M / 2:  # not yet over the rim: straight up
            across = across * 0.0
        return _towards(scene, scene.hand + (*across, lift), 0.0, CLOSE)
    grasp = plan_grasp(scene.object, scene.finger_axis)
    off = np.hypot(*(grasp.center - scene.hand)[:2])
    is_aligned = abs(grasp.turn) < ALIGNED_RAD
    if off < AT_M and is_aligned and abs(scene.hand[2] - grasp.center[2]) < AT_M:
        return _towards(scene, grasp.center, 0.0, CLOSE)
    if off < ABOVE_M and is_aligned:
        return _towards(scene, grasp.center, grasp.turn, OPEN)
    above = np.array([*grasp.center[:2], high + CLEARANCE_M])
    if scene.hand[2] < high + CLEARANCE_M / 3 and off < 3 * CLEARANCE_M:  # beside it: up first, not through it
        above[:2] = scene.hand[:2]
    return _towards(scene, above, grasp.turn, OPEN)


def _towards(scene: Scene, target: Any, turn: float, gripper: float) -> Float32:
    """Part of the way to a pose, within one control step's reach."""
    move = GAIN * (np.asarray(target) - scene.hand) / FULL_STEP_M
    rotation = GAIN * np.array([*scene.tilt, turn]) / FULL_STEP_RAD
    # One factor for all of the translation: a straight line, not first diagonal and then along an axis.
    move = move / max(1.0, float(np.abs(move).max()))
    return np.array([*move, *np.clip(rotation, -1, 1), gripper], np.float32)


def _middle(values: Float64) -> float:
    return float(values.min() + values.max()) / 2
