"""All message code: pictures, joint states, chunks. Checks what it reads; raises `BadObservation`, never anything else.

A chunk goes out twice with the same stamp: as `JointTrajectory`, which any controller plays, and as a JSON line that
says where its numbers came from (docs/ros.md has the keys). Standard messages only, so nothing has to be built.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from builtin_interfaces.msg import Duration, Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, MultiArrayDimension, String
from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint

from vla_spec.clock import NS_PER_S
from vla_spec.errors import BadObservation, MissingDependency
from vla_spec.nodes._action_layout import ActionLayout
from vla_spec.types import ActionChunk, Float32, Provenance, Rung, UInt8

#: Encoding -> channels and where red, green and blue are; one channel is grey.
ENCODINGS: dict[str, tuple[int, tuple[int, int, int]]] = {
    "rgb8": (3, (0, 1, 2)), "bgr8": (3, (2, 1, 0)), "rgba8": (4, (0, 1, 2)), "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)), "8UC3": (3, (2, 1, 0)),
}  # fmt: skip
#: A picture is refused beyond this, before anything is allocated for it.
MAX_PIXELS = 64_000_000
#: A trajectory of more rows, or a provenance line of more characters, is none of ours; an actor has no time for it.
MAX_POINTS = 4096
MAX_INFO_CHARS = 1_000_000


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """Where a trajectory's numbers came from, as on ``trajectory_info``.

    Attributes:
        chunk_id: counts up in one run of a planner.
        stamp_ns: of the trajectory that it belongs to.
        rung: the weakest thing in it.
        provenance: uint8 [h, A], values of `Provenance`.
        instruction: what it obeys.
        planning_ms: how long it took.
        slack_ms: time left until its deadline when it was ready; negative = late.
        max_deviation: largest distance from the target's choice, in the rule's unit.
        num_tokens: that were decoded.
    """

    chunk_id: int
    stamp_ns: int
    rung: Rung
    provenance: UInt8
    instruction: str
    planning_ms: float
    slack_ms: float
    max_deviation: float
    num_tokens: int


def stamp_ns(stamp: Time) -> int:
    """A message's time [ns]."""
    return int(stamp.sec) * NS_PER_S + int(stamp.nanosec)


def to_stamp(time_ns: int) -> Time:
    """The inverse of `stamp_ns`."""
    return Time(sec=time_ns // NS_PER_S, nanosec=time_ns % NS_PER_S)


def read_image(message: Image) -> UInt8:
    """uint8 [h, w, 3], red first; a view of the message where its layout allows.

    Raises:
        BadObservation: another encoding, or sizes that contradict each other.
    """
    if message.encoding not in ENCODINGS:
        raise BadObservation("image encoding", repr(message.encoding[:40]), ", ".join(ENCODINGS))
    channels, order = ENCODINGS[message.encoding]
    height, width, row = int(message.height), int(message.width), int(message.step)
    if not 0 < height * width <= MAX_PIXELS or row < width * channels or len(message.data) != row * height:
        found = f"{width} x {height}, step {row}, {len(message.data)} bytes"
        raise BadObservation("image", found, f"step of {width * channels} or more, step * height bytes")
    pixels = np.frombuffer(message.data, np.uint8).reshape(height, row)[:, : width * channels]
    pixels = pixels.reshape(height, width, channels)
    return pixels if order == (0, 1, 2) and channels == 3 else np.ascontiguousarray(pixels[:, :, order])


def read_compressed(message: CompressedImage) -> UInt8:
    """The same of a JPEG or PNG.

    Raises:
        BadObservation: not a picture.
        MissingDependency: Pillow is not installed.
    """
    try:
        import io

        from PIL import Image as Picture
    except ImportError as error:
        raise MissingDependency("Pillow", "pip install 'vla_spec[report]'") from error
    try:
        with Picture.open(io.BytesIO(bytes(message.data)), formats=("JPEG", "PNG")) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels")
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Picture.DecompressionBombError) as error:
        raise BadObservation("compressed image", str(error)[:100], "a JPEG or PNG") from error


def write_image(pixels: UInt8, time_ns: int, frame: str) -> Image:
    """A message of uint8 [h, w, 3]."""
    height, width, _ = pixels.shape
    message = Image(height=height, width=width, encoding="rgb8", step=3 * width)
    message.header.stamp, message.header.frame_id = to_stamp(time_ns), frame
    message.data = pixels.tobytes()  # bytes go in as they are; an array would be copied element by element
    return message


def read_joints(message: JointState, names: Sequence[str]) -> Float32:
    """Positions of these joints, float32 [S], whatever the message's order.

    Raises:
        BadObservation: a joint is missing, or not a finite number.
    """
    if list(message.name) == list(names):
        values = _float32(message.position)
    else:
        places = {name: i for i, name in enumerate(message.name)}
        missing = [name for name in names if name not in places]
        if missing or len(message.position) < len(message.name):
            found = f"{missing} missing" if missing else f"{len(message.position)} positions"
            raise BadObservation("joint_states", found, f"positions of {', '.join(names)}")
        values = _float32([message.position[places[name]] for name in names])
    if len(values) != len(names) or not np.isfinite(values).all():
        raise BadObservation("joint_states", str(values.tolist()), f"{len(names)} finite positions")
    return values


def write_joints(names: Sequence[str], values: Float32, time_ns: int) -> JointState:
    """A message with positions."""
    message = JointState(name=list(names), position=[float(v) for v in values])
    message.header.stamp = to_stamp(time_ns)
    return message


def write_chunk(
    chunk: ActionChunk, layout: ActionLayout, start: Sequence[float] | None, frame: str = ""
) -> tuple[JointTrajectory, String]:
    """A chunk as trajectory and as provenance. Its observation stamp has to be on ROS's clock.

    ``start``: joint positions at the observation.
    """
    positions, velocities = layout.to_joints(chunk.actions, start)
    trajectory = JointTrajectory(joint_names=list(layout.joints))
    trajectory.header.stamp, trajectory.header.frame_id = to_stamp(chunk.observation_stamp_ns), frame
    for place, speed, time_s in zip(positions, velocities, layout.times_s(len(positions)), strict=True):
        time_ns = round(time_s * NS_PER_S)
        trajectory.points.append(
            JointTrajectoryPoint(
                positions=place.tolist(), velocities=speed.tolist(),
                time_from_start=Duration(sec=time_ns // NS_PER_S, nanosec=time_ns % NS_PER_S),
            )
        )  # fmt: skip
    info = {
        "chunk_id": chunk.chunk_id,
        "stamp_ns": chunk.observation_stamp_ns,
        "rung": chunk.rung.name,
        "provenance": chunk.provenance.tolist(),
        "instruction": chunk.instruction,
        "planning_ms": (chunk.ready_ns - chunk.start_ns) / 1e6,
        "slack_ms": chunk.slack_ns / 1e6,
        "max_deviation": chunk.max_deviation,
        "num_tokens": len(chunk.tokens),
    }
    return trajectory, String(data=json.dumps(info))


def read_chunk(trajectory: JointTrajectory, info: ChunkInfo | None, layout: ActionLayout, step: int) -> ActionChunk:
    """The chunk of these messages, for control step ``step``. Without provenance it counts as drafted: bounded.

    Raises:
        BadObservation: other joints, rows of another length, times that are not the control period's, not finite.
    """
    if list(trajectory.joint_names) != list(layout.joints):
        raise BadObservation("trajectory joints", str(list(trajectory.joint_names))[:200], str(list(layout.joints)))
    points, size = trajectory.points, layout.size
    if not 0 < len(points) <= MAX_POINTS or any(len(p.positions) != size or len(p.velocities) != size for p in points):
        expected = f"1 to {MAX_POINTS} points with {size} positions and velocities"
        raise BadObservation("trajectory", f"{len(points)} points", expected)
    times = np.array([p.time_from_start.sec + p.time_from_start.nanosec / NS_PER_S for p in points])
    if not np.allclose(times, layout.times_s(len(points)), rtol=0, atol=1e-6):
        raise BadObservation("trajectory times", str(times[:3].tolist()), f"multiples of {layout.dt_s} s")
    positions = np.array([p.positions for p in points], np.float64)
    velocities = np.array([p.velocities for p in points], np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # what does not fit becomes infinite, and is refused
        actions = layout.to_actions(positions, velocities)
    if not (np.isfinite(positions).all() and np.isfinite(velocities).all() and np.isfinite(actions).all()):
        raise BadObservation("trajectory", "not finite", "finite positions and velocities")
    stamp = stamp_ns(trajectory.header.stamp)
    if info is None or info.stamp_ns != stamp:
        provenance = np.full(actions.shape, Provenance.DRAFTED, np.uint8)
        info = ChunkInfo(-1, stamp, Rung.DRAFT_TAIL, provenance, "", 0.0, 0.0, 0.0, 0)
    if info.provenance.shape != actions.shape:
        raise BadObservation("trajectory_info", f"provenance {list(info.provenance.shape)}", str(list(actions.shape)))
    return ActionChunk(
        actions, info.provenance, info.rung, info.chunk_id, info.instruction, stamp, step, stamp, stamp, stamp,
        np.empty(0, np.int32), info.max_deviation,
    )  # fmt: skip


def read_info(message: String) -> ChunkInfo:
    """The provenance line.

    Raises:
        BadObservation: not a JSON object with the keys of `write_chunk`, or values of other types.
    """
    try:
        if len(message.data) > MAX_INFO_CHARS:
            raise ValueError(f"{len(message.data)} characters")
        known = json.loads(message.data)
        rows = known["provenance"]
        if not rows or any(type(cell) is not int or not 0 <= cell <= max(Provenance) for row in rows for cell in row):
            raise ValueError("provenance")
        info = ChunkInfo(
            chunk_id=_number(known, "chunk_id", int), stamp_ns=_number(known, "stamp_ns", int),
            rung=Rung[known["rung"]], provenance=np.array(rows, np.uint8), instruction=known["instruction"],
            planning_ms=_number(known, "planning_ms", float), slack_ms=_number(known, "slack_ms", float),
            max_deviation=_number(known, "max_deviation", float), num_tokens=_number(known, "num_tokens", int),
        )  # fmt: skip
        if info.provenance.ndim != 2 or not isinstance(info.instruction, str):
            raise TypeError("provenance or instruction")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        expected = "JSON with the keys that docs/ros.md names"
        raise BadObservation("trajectory_info", repr(error)[:100], expected) from error
    return info


def _number(known: dict[str, Any], name: str, kind: type) -> Any:
    """A finite number of a JSON object.

    Raises:
        TypeError, ValueError: another type, or not finite.
    """
    value = known[name]
    if type(value) not in ((int,) if kind is int else (int, float)):
        raise TypeError(name)
    if not math.isfinite(value):
        raise ValueError(name)
    return kind(value)


def _float32(values: Sequence[float]) -> Float32:
    """Float32 [n]; what does not fit becomes infinite."""
    with np.errstate(over="ignore"):
        return np.array(values, np.float32)


def write_actions(actions: Float32, joints: Sequence[str]) -> Float64MultiArray:
    """Actions [h, A] or [A] as labelled numbers."""
    rows = np.atleast_2d(actions)
    message = Float64MultiArray(data=rows.reshape(-1).astype(float).tolist())
    h, a = rows.shape
    message.layout.dim = [
        MultiArrayDimension(label="step", size=h, stride=h * a),
        MultiArrayDimension(label=",".join(joints), size=a, stride=a),
    ]
    return message


def write_status(
    name: str, values: Mapping[str, Any], level: bytes = DiagnosticStatus.OK, said: str = ""
) -> DiagnosticStatus:  # fmt: skip
    """How one part of a node is: level, one sentence, figures."""
    return DiagnosticStatus(
        name=name, hardware_id="vla_spec", level=level, message=said,
        values=[KeyValue(key=k, value=str(v)) for k, v in values.items()],
    )  # fmt: skip


def write_statuses(statuses: Sequence[DiagnosticStatus], time_ns: int) -> DiagnosticArray:
    """Several of them, as `status` and `/diagnostics` have it."""
    message = DiagnosticArray(status=list(statuses))
    message.header.stamp = to_stamp(time_ns)
    return message


def type_named(name: str) -> Any:
    """The message class of ``std_msgs/msg/String``; None = its package is not installed here."""
    package, _, short = name.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.msg"), short)
    except (ImportError, AttributeError):
        return None


def read_action(message: Float64MultiArray, size: int) -> Float32:
    """One action, float32 [A].

    Raises:
        BadObservation: another length, or not finite.
    """
    action = _float32(message.data)
    if action.shape != (size,) or not np.isfinite(action).all():
        raise BadObservation("command", str(action.tolist())[:100], f"{size} finite numbers")
    return action
