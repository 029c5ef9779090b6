"""Messages there and back, and everything that is wrong with one: refused with one sentence. Needs rclpy."""

import json

import numpy as np
import pytest

pytest.importorskip("rclpy")

from builtin_interfaces.msg import Duration
from hypothesis import given
from hypothesis import strategies as st
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray, String
from trajectory_msgs.msg import JointTrajectoryPoint

from vla_spec.action_space import DofKind
from vla_spec.errors import BadObservation
from vla_spec.nodes import _messages as messages
from vla_spec.nodes._action_layout import ActionLayout
from vla_spec.types import ActionChunk, Provenance, Rung

LAYOUT = ActionLayout(("x1", "x2", "grip"), (DofKind.DELTA, DofKind.DELTA, DofKind.SWITCH), (0.01, 0.02, 1.0), 0.0125)


def chunk(num_rows=8, stamp_ns=1_500_000_000, rung=Rung.RELAXED):
    rng = np.random.default_rng(num_rows)
    actions = rng.uniform(-1, 1, (num_rows, 3)).astype(np.float32)
    provenance = rng.integers(0, 2, actions.shape).astype(np.uint8)
    return ActionChunk(actions, provenance, rung, 7, "open it", stamp_ns, 40, 100, 20_100, 50_100, np.arange(24), 0.003)


def picture(encoding="rgb8", channels=3, padding=0):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 255, (5, 4, channels), dtype=np.uint8)
    rows = np.concatenate((pixels.reshape(5, -1), np.zeros((5, padding), np.uint8)), 1)
    return pixels, Image(height=5, width=4, encoding=encoding, step=4 * channels + padding, data=rows.tobytes())


def test_a_chunk_comes_back_as_it_was():
    sent = chunk()
    trajectory, info = messages.write_chunk(sent, LAYOUT, [0.1, 0.2, 0.0])
    got = messages.read_chunk(trajectory, messages.read_info(info), LAYOUT, step=12)
    np.testing.assert_array_equal(got.actions, sent.actions)
    np.testing.assert_array_equal(got.provenance, sent.provenance)
    assert (got.rung, got.chunk_id, got.instruction, got.observation_stamp_ns, got.observation_step) == (
        sent.rung, 7, "open it", sent.observation_stamp_ns, 12,
    )  # fmt: skip


def test_a_trajectory_says_when_each_joint_is_where():
    """What a stock controller reads: the observation's stamp, one point per control step, positions and velocities."""
    sent = chunk()
    trajectory, info = messages.write_chunk(sent, LAYOUT, [0.1, 0.2, 0.0])
    assert messages.stamp_ns(trajectory.header.stamp) == sent.observation_stamp_ns
    times = [p.time_from_start.sec + p.time_from_start.nanosec / 1e9 for p in trajectory.points]
    np.testing.assert_allclose(times, (np.arange(8) + 1) * 0.0125)
    np.testing.assert_allclose(trajectory.points[-1].positions[0], 0.1 + 0.01 * sent.actions[:, 0].sum(), rtol=1e-6)
    np.testing.assert_allclose(trajectory.points[2].velocities[1], 0.02 * sent.actions[2, 1] / 0.0125, rtol=1e-6)
    known = json.loads(info.data)
    assert known["planning_ms"] == pytest.approx(0.02)
    assert known["slack_ms"] == pytest.approx(0.03)


@pytest.mark.parametrize("info", [None, "other stamp"])
def test_without_provenance_a_chunk_counts_as_unverified(info):
    trajectory, own = messages.write_chunk(chunk(), LAYOUT, None)
    if info is not None:
        own = messages.write_chunk(chunk(stamp_ns=9), LAYOUT, None)[1]
    got = messages.read_chunk(trajectory, messages.read_info(own) if info else None, LAYOUT, 0)
    assert (got.provenance == Provenance.DRAFTED).all()
    assert got.rung is Rung.DRAFT_TAIL


def broken(change):
    trajectory, info = messages.write_chunk(chunk(), LAYOUT, None)
    change(trajectory, info)
    return trajectory, info


def other_joints(trajectory, info):
    trajectory.joint_names = ["x2", "x1", "grip"]


def no_points(trajectory, info):
    trajectory.points = []


def short_row(trajectory, info):
    trajectory.points[3].velocities = [0.0]


def other_times(trajectory, info):
    trajectory.points[3].time_from_start.nanosec += 5_000_000


def not_a_number(trajectory, info):
    trajectory.points[0].velocities[0] = float("nan")


def not_json(trajectory, info):
    info.data = "{"


def unknown_rung(trajectory, info):
    info.data = info.data.replace("RELAXED", "WONDERFUL")


def other_shape(trajectory, info):
    known = json.loads(info.data)
    info.data = json.dumps({**known, "provenance": known["provenance"][:2]})


@pytest.mark.parametrize(
    "change",
    [other_joints, no_points, short_row, other_times, not_a_number, not_json, unknown_rung, other_shape],
)
def test_what_is_no_chunk_is_refused(change):
    trajectory, info = broken(change)
    with pytest.raises(BadObservation, match=r"valid|expected"):
        messages.read_chunk(trajectory, messages.read_info(info), LAYOUT, 0)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    ("encoding", "channels", "order"),
    [("rgb8", 3, (0, 1, 2)), ("bgr8", 3, (2, 1, 0)), ("rgba8", 4, (0, 1, 2)), ("bgra8", 4, (2, 1, 0)),
     ("mono8", 1, (0, 0, 0))],
)  # fmt: skip
def test_pictures_of_every_encoding_come_out_red_first(encoding, channels, order, padding):
    pixels, message = picture(encoding, channels, padding)
    np.testing.assert_array_equal(messages.read_image(message), pixels[:, :, order])


def test_a_picture_there_and_back():
    pixels, _ = picture()
    message = messages.write_image(pixels, 3_000_000_007, "camera_0")
    np.testing.assert_array_equal(messages.read_image(message), pixels)
    assert (message.header.stamp.sec, message.header.stamp.nanosec, message.header.frame_id) == (3, 7, "camera_0")


def test_pictures_that_are_none_are_refused():
    for change in ({"encoding": "yuv422"}, {"step": 11}, {"height": 6}, {"height": 0}, {"data": b"12"}):
        _, message = picture()
        for name, value in change.items():
            setattr(message, name, value)
        with pytest.raises(BadObservation, match="image"):
            messages.read_image(message)
    for data in (b"", b"\xff\xd8\xff\xe0 no picture", b"GIF89a"):
        with pytest.raises(BadObservation, match="compressed image"):
            messages.read_compressed(CompressedImage(format="jpeg", data=data))


def test_compressed_pictures():
    import io

    from PIL import Image as Picture

    pixels, _ = picture()
    stream = io.BytesIO()
    Picture.fromarray(pixels).save(stream, "PNG")
    message = CompressedImage(format="png", data=stream.getvalue())
    np.testing.assert_array_equal(messages.read_compressed(message), pixels)


def test_joints_are_found_by_name():
    message = JointState(name=["c", "a", "b"], position=[3.0, 1.0, 2.0])
    np.testing.assert_array_equal(messages.read_joints(message, ["a", "b"]), [1, 2])
    np.testing.assert_array_equal(messages.read_joints(message, ["c", "a", "b"]), [3, 1, 2])
    for wrong in (
        JointState(name=["a"], position=[1.0]), JointState(name=["a", "b"], position=[1.0]),
        JointState(name=["a", "b"], position=[1.0, float("nan")]), JointState(),
    ):  # fmt: skip
        with pytest.raises(BadObservation, match="joint_states"):
            messages.read_joints(wrong, ["a", "b"])


def test_commands_there_and_back():
    action = np.array([0.1, -0.2, 1.0], np.float32)
    message = messages.write_actions(action, LAYOUT.joints)
    np.testing.assert_array_equal(messages.read_action(message, 3), action)
    assert [(d.label, d.size) for d in message.layout.dim] == [("step", 1), ("x1,x2,grip", 3)]
    for data in ([0.0], [0.0, float("inf"), 0.0]):
        with pytest.raises(BadObservation, match="command"):
            messages.read_action(Float64MultiArray(data=data), 3)


def test_provenance_of_a_stranger_is_refused():
    for text in ("[]", '{"rung": "EXACT"}', '{"rung": "EXACT", "provenance": 1, "stamp_ns": 2}', "null"):
        with pytest.raises(BadObservation, match="trajectory_info"):
            messages.read_info(String(data=text))


VALUES = st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers()


@given(st.text(max_size=20) | st.recursive(VALUES, st.lists, max_leaves=4).map(json.dumps))
def test_no_text_does_more_to_an_actor_than_being_refused(text):
    with pytest.raises(BadObservation):
        messages.read_info(String(data=text.encode("utf-8", "ignore").decode()))


JUNK = st.none() | st.floats() | st.text(max_size=3) | st.integers() | st.lists(st.integers(), max_size=3)


@given(
    st.sampled_from(["chunk_id", "stamp_ns", "rung", "provenance", "instruction", "planning_ms", "slack_ms"]),
    JUNK | st.lists(JUNK, max_size=3),
)
def test_one_wrong_value_is_refused_or_harmless(name, junk):
    trajectory, own = messages.write_chunk(chunk(), LAYOUT, None)
    try:
        info = messages.read_info(String(data=json.dumps({**json.loads(own.data), name: junk})))
        got = messages.read_chunk(trajectory, info, LAYOUT, 0)
    except BadObservation:
        return
    assert got.actions.shape == got.provenance.shape
    assert got.rung in Rung


numbers = st.floats() | st.floats(-3, 3)


@given(
    st.lists(
        st.tuples(st.lists(numbers, max_size=4), st.lists(numbers, max_size=4), st.integers(0, 10**9 - 1)), max_size=4
    )
)
def test_no_trajectory_does_more_to_an_actor_than_being_refused(points):
    trajectory, _ = messages.write_chunk(chunk(), LAYOUT, None)
    trajectory.points = [
        JointTrajectoryPoint(positions=p, velocities=v, time_from_start=Duration(nanosec=t)) for p, v, t in points
    ]
    try:
        got = messages.read_chunk(trajectory, None, LAYOUT, 0)
    except BadObservation:
        return
    assert np.isfinite(got.actions).all()


@given(
    st.sampled_from([*messages.ENCODINGS, "", "yuv422"]), st.integers(0, 50), st.integers(0, 50), st.integers(0, 200),
    st.binary(max_size=400),
)  # fmt: skip
def test_no_picture_does_more_than_being_refused(encoding, height, width, step, data):
    try:
        pixels = messages.read_image(Image(height=height, width=width, encoding=encoding, step=step, data=data))
    except BadObservation:
        return
    assert pixels.shape == (height, width, 3)


def test_numbers_that_fit_no_float32_are_refused():
    with pytest.raises(BadObservation, match="joint_states"):
        messages.read_joints(JointState(name=["a"], position=[1e300]), ["a"])
    with pytest.raises(BadObservation, match="command"):
        messages.read_action(Float64MultiArray(data=[1e300]), 1)
    trajectory, info = messages.write_chunk(chunk(), LAYOUT, None)
    trajectory.points[0].velocities[0] = 1e300
    with pytest.raises(BadObservation, match="trajectory"):
        messages.read_chunk(trajectory, None, LAYOUT, 0)
    assert json.loads(info.data)["rung"] == "RELAXED"


def test_more_than_a_chunk_can_be_is_refused_before_it_costs_anything():
    trajectory, _ = messages.write_chunk(chunk(), LAYOUT, None)
    trajectory.points = list(trajectory.points) * 1000
    with pytest.raises(BadObservation, match="4096"):
        messages.read_chunk(trajectory, None, LAYOUT, 0)
    with pytest.raises(BadObservation, match="1000001 characters"):
        messages.read_info(String(data=" " * 1_000_001))
