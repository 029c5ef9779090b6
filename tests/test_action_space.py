"""Hold, decelerating stop and bounds, for each kind of action."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_spec.action_space import ActionSpace, DofKind
from vla_spec.chunks import ChunkBuffer, ChunkOptions, Gap
from vla_spec.types import ActionChunk, Provenance, Rung

MOVING = [DofKind.DELTA, DofKind.POSITION, DofKind.VELOCITY]


def space_of(kind, stop_steps=4, max_change=0.5):
    """One degree of freedom of a kind, and a gripper."""
    limits = np.full(2, 1, np.float32)
    return ActionSpace.from_limits(-limits, limits, [1], kind, max_change, stop_steps)


def chunk(step, column, rung=Rung.EXACT, provenance=Provenance.EXACT, gripper=1.0, chunk_id=0):
    actions = np.stack((np.array(column, np.float32), np.full(len(column), gripper, np.float32)), 1)
    return ActionChunk(
        actions, np.full(actions.shape, provenance, np.uint8), rung, chunk_id, "go", 1000 + step, step, 0, 0, 0,
        np.arange(2 * len(column), dtype=np.int32),
    )  # fmt: skip


def play(buffer, *steps):
    return [buffer.command(step) for step in steps]


def column(commands):
    return pytest.approx([float(c.action[0]) for c in commands], abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "held", "stopped"),
    [
        (DofKind.DELTA, [0, 0], [0, 0, 0, 0, 0]),  # stands already
        (DofKind.POSITION, [0.4, 0.4], [0.4] * 5),
        (DofKind.VELOCITY, [0.4, 0.4], [0.3, 0.2, 0.1, 0, 0]),
    ],
)
def test_running_out_of_plans_holds_and_then_stops(kind, held, stopped):
    b = ChunkBuffer(space_of(kind), 2, ChunkOptions(max_holds=2))
    b.put(chunk(0, [0.2, 0.4]))
    play(b, 0, 1)
    assert held == column(play(b, 2, 3))
    commands = play(b, *range(4, 9))
    assert stopped == column(commands)
    assert all(c.action[1] == 1 and c.provenance is Provenance.HOLD for c in commands)
    assert (b.rung_counts[Rung.HOLD], b.rung_counts[Rung.STOP]) == (2, 5)
    assert b.gap_counts == {Gap.STARTING: 0, Gap.RAN_OUT: 7, Gap.PLANNED: 0}


@pytest.mark.parametrize(
    ("kind", "stopped"),
    [
        (DofKind.DELTA, [0.3, 0.2, 0.1, 0.0]),  # increments
        (DofKind.POSITION, [0.55, 0.65, 0.70, 0.70]),  # moved by 0.2 a step: on by 0.15, 0.1, 0.05, 0
        (DofKind.VELOCITY, [0.3, 0.2, 0.1, 0.0]),
    ],
)
def test_a_stop_in_full_motion_decelerates(kind, stopped):
    """A plan on rung STOP while the arm moves: no step of the way is larger than the one before."""
    b = ChunkBuffer(space_of(kind), 2)
    b.put(chunk(0, [0.2, 0.4, 0.6, 0.8]))
    play(b, 0, 1)
    b.put(chunk(2, [0] * 8, Rung.STOP, Provenance.HOLD, chunk_id=1))
    commands = play(b, *range(2, 8))
    assert [*stopped, stopped[-1], stopped[-1]] == column(commands)
    assert b.rung_counts[Rung.STOP] == 6
    assert b.gap_counts[Gap.PLANNED] == 6


def test_before_anything_was_sent_it_rests():
    for kind in MOVING:
        b = ChunkBuffer(space_of(kind), 2, ChunkOptions(max_holds=1))
        assert [0, 0, 0] == column(play(b, 0, 1, 2))
        assert b.gap_counts[Gap.STARTING] == 3


@given(
    st.sampled_from(MOVING),
    st.floats(-1, 1), st.floats(-1, 1), st.integers(1, 12), st.floats(0.01, 0.5),
)  # fmt: skip
def test_a_stop_stays_in_the_limits_and_comes_to_rest(kind, before, last, stop_steps, max_change):
    space = space_of(kind, stop_steps, max_change)
    first = np.array([before, 1], np.float32)
    now = np.array([last, -1], np.float32)
    rows = np.array([space.stop(now, k, first) for k in range(stop_steps + 3)])
    assert (abs(rows) <= 1).all()
    assert (rows[:, 1] == -1).all()
    speed = np.diff(np.concatenate((now[None], rows))[:, 0]) if kind is DofKind.POSITION else rows[:, 0]
    assert (abs(speed[1:]) <= abs(speed[:-1]) + 1e-6).all()  # never faster again
    assert abs(speed[-3:]).max() < 1e-6
    if kind is DofKind.POSITION:
        assert abs(speed[0]) <= max_change + 1e-6


@pytest.mark.parametrize("kind", MOVING)
def test_an_unverified_action_makes_no_jump_from_what_was_played(kind):
    """The tail was bounded behind its own verified prefix; played late, it follows another chunk's action."""
    b = ChunkBuffer(space_of(kind, max_change=0.2), 2)
    b.put(chunk(0, [-0.8] * 3))
    play(b, 0, 1, 2)
    late = chunk(1, [0.7] * 6, Rung.DRAFT_TAIL, gripper=-1, chunk_id=1)
    late.provenance[2:] = Provenance.DRAFTED
    b.put(late)
    commands = play(b, 3, 4, 5, 6)
    assert [-0.6, -0.4, -0.2, 0.0] == column(commands)
    assert all(c.provenance is Provenance.DRAFTED for c in commands)
    assert all(c.action[1] == -1 for c in commands)  # switches are bounded where the tail is made


@pytest.mark.parametrize("kind", MOVING)
def test_a_tail_slows_down_without_jumps_inside_the_limits(kind):
    space = space_of(kind, max_change=0.3)
    before = np.array([0.5, 1], np.float32)
    rows = np.array([[0.6, -1], [2.0, -1], [-2.0, -1], [0.9, -1]], np.float32)
    bounded = space.bound(rows, before, 0.5)
    steps = np.diff(np.concatenate((before[None], bounded))[:, 0])
    assert (abs(steps) <= 0.3 + 1e-6).all()
    assert (abs(bounded) <= 1).all()
    assert (bounded[:, 1] == 1).all()
    if kind is DofKind.POSITION:
        assert bounded[0, 0] == pytest.approx(0.5 + 0.5 * 0.1)


def test_a_verified_action_is_the_targets_own_whatever_came_before():
    b = ChunkBuffer(space_of(DofKind.DELTA, max_change=0.1), 2)
    b.put(chunk(0, [-0.8]))
    b.put(chunk(1, [0.8], chunk_id=1))
    assert [-0.8, 0.8] == column(play(b, 0, 1))
