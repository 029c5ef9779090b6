import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vla_spec.action_space import ActionSpace, DofKind
from vla_spec.chunks import ChunkBuffer, ChunkOptions, HandOver
from vla_spec.delay import DelayEstimator
from vla_spec.errors import BadConfig
from vla_spec.types import ActionChunk, Provenance, Rung

LOW, HIGH = np.full(2, -1, np.float32), np.full(2, 1, np.float32)
SPACE = ActionSpace.from_limits(LOW, HIGH, switches=[1])


def chunk(step, rows=4, chunk_id=0, value=None, gripper=0.5, provenance=Provenance.EXACT, **changes):
    """Row i moves by ``value`` (default (step + i) / 100, so that an action tells which step it was meant for)."""
    actions = np.zeros((rows, 2), np.float32)
    actions[:, 0] = [(step + i) / 100 if value is None else value for i in range(rows)]
    actions[:, 1] = gripper
    values = dict(
        actions=actions, provenance=np.full((rows, 2), provenance, np.uint8), rung=Rung.EXACT, chunk_id=chunk_id,
        instruction="go", observation_stamp_ns=1000 + step, observation_step=step, start_ns=0, ready_ns=0,
        deadline_ns=0, tokens=np.arange(2 * rows, dtype=np.int32) + 10 * chunk_id,
    )  # fmt: skip
    return ActionChunk(**{**values, **changes})


def buffer(**options):
    return ChunkBuffer(SPACE, 2, ChunkOptions(**options))


def motion(command):
    return round(float(command.action[0]), 6)


def test_action_i_belongs_to_control_step_observation_step_plus_i():
    b = buffer()
    b.put(chunk(3))
    for step in range(3):
        assert b.command(step).provenance is Provenance.HOLD
    assert [motion(b.command(s)) for s in range(3, 7)] == [0.03, 0.04, 0.05, 0.06]
    assert b.counts[Provenance.EXACT] == 4
    assert b.counts[Provenance.HOLD] == 3


def test_a_late_chunk_is_used_for_its_actions_that_still_lie_ahead():
    b = buffer()
    b.put(chunk(0))
    for step in range(3):
        b.command(step)
    assert b.put(chunk(1, chunk_id=1))  # steps 1 and 2 are over
    command = b.command(3)
    assert (motion(command), command.row, command.provenance) == (0.03, 2, Provenance.EXACT)


def test_a_chunk_that_holds_shifted_does_not_outdate_newer_observations():
    """The second was observed while the first was under way, before the steps in which the arm held were over."""
    b = buffer()
    for step in range(6):
        b.command(step)
    assert b.put(chunk(0, rows=8))  # shifted: its row 0 is due now
    assert b.put(chunk(2, rows=8, chunk_id=1))
    assert (b.num_out_of_order, b.num_shifted) == (0, 2)
    assert b.command(6).chunk_id == 1
    assert not b.put(chunk(1, rows=8, chunk_id=2))
    assert b.num_out_of_order == 1


def test_a_chunk_of_the_past_is_refused_and_counted():
    b = buffer()
    b.put(chunk(0, rows=8))
    for step in range(5):
        b.command(step)
    assert not b.put(chunk(1))
    assert b.num_stale == 1


def test_an_older_observation_never_replaces_a_newer_one():
    b = buffer()
    assert b.put(chunk(4, chunk_id=1))
    assert not b.put(chunk(2, chunk_id=0))
    assert b.num_out_of_order == 1


def test_a_plan_from_before_the_reset_is_refused():
    b = buffer()
    b.reset(2000)
    assert not b.put(chunk(0))  # stamp 1000
    assert b.put(chunk(0, observation_stamp_ns=2000))


def test_replace_takes_the_newest_at_once():
    b = buffer()
    b.put(chunk(0, value=0.1))
    assert motion(b.command(0)) == 0.1
    b.put(chunk(1, value=0.9, chunk_id=1))
    command = b.command(1)
    assert (motion(command), command.chunk_id, command.row) == (0.9, 1, 0)


def test_the_remainder_of_an_older_chunk_serves_where_a_short_one_ends():
    b = buffer()
    b.put(chunk(0, rows=6, value=0.1))
    b.put(chunk(1, rows=2, value=0.2, chunk_id=1))
    commands = [b.command(s) for s in range(1, 6)]
    assert [motion(c) for c in commands] == [0.2, 0.2, 0.1, 0.1, 0.1]
    assert [c.provenance for c in commands] == [Provenance.EXACT] * 2 + [Provenance.TAIL] * 3
    assert b.rung_counts[Rung.LAST_CHUNK] == 3


def test_temporal_ensemble_weights_are_those_of_act():
    b = buffer(hand_over=HandOver.TEMPORAL_ENSEMBLE, ensemble_decay=0.5)
    b.put(chunk(0, value=0.0, gripper=-1))
    b.put(chunk(1, value=0.3, gripper=-1, chunk_id=1))
    b.put(chunk(2, value=0.6, gripper=1, chunk_id=2, provenance=Provenance.RELAXED))
    weights = np.exp(-0.5 * np.arange(3))  # the oldest first and heaviest
    expected = weights @ [0.0, 0.3, 0.6] / weights.sum()
    command = b.command(2)
    assert command.action[0] == pytest.approx(expected, abs=1e-6)
    assert command.action[1] == 1  # a switch is the newest chunk's, no mean
    assert (command.provenance, command.chunk_id, command.row) == (Provenance.RELAXED, 2, 0)


def test_ensemble_leaves_out_chunks_that_do_not_cover_the_step():
    b = buffer(hand_over=HandOver.TEMPORAL_ENSEMBLE, ensemble_decay=0)
    b.put(chunk(0, rows=2, value=0.8))
    b.put(chunk(1, value=0.2, chunk_id=1))
    assert [motion(b.command(s)) for s in (1, 2)] == [0.5, 0.2]


def test_frozen_prefix_keeps_what_was_due_while_inference_ran():
    b = buffer(hand_over=HandOver.FROZEN_PREFIX)
    b.put(chunk(0, rows=8, value=0.1))
    b.command(0)
    b.freeze(1, 3)  # steps 1, 2 and 3
    b.put(chunk(1, rows=8, value=0.9, chunk_id=1))  # faster than expected
    commands = [b.command(s) for s in range(1, 6)]
    assert [motion(c) for c in commands] == [0.1, 0.1, 0.1, 0.9, 0.9]
    assert [c.chunk_id for c in commands] == [0, 0, 0, 1, 1]
    assert all(c.provenance is Provenance.EXACT for c in commands)


def test_freeze_means_nothing_in_the_other_modes():
    b = buffer()
    b.put(chunk(0, value=0.1))
    b.freeze(0, 3)
    b.put(chunk(0, value=0.9, chunk_id=1))
    assert motion(b.command(0)) == 0.9


def test_past_the_end_it_holds_with_zero_delta_and_the_gripper_kept_then_stops():
    b = buffer(max_holds=2)
    b.put(chunk(0, rows=1, value=0.4, gripper=-1))
    b.command(0)
    commands = [b.command(s) for s in range(1, 5)]
    assert all(c.action.tolist() == [0, -1] and c.provenance is Provenance.HOLD for c in commands)
    assert commands[0][2:] == (-1, -1)
    assert (b.rung_counts[Rung.HOLD], b.rung_counts[Rung.STOP]) == (2, 2)
    assert b.holds_in_a_row == 4


def test_positions_hold_the_last_pose():
    space = ActionSpace.from_limits(LOW, HIGH, kind=DofKind.POSITION)
    b = ChunkBuffer(space, 2)
    b.put(chunk(0, rows=1, value=0.4, gripper=0.2))
    assert b.command(0).action.tolist() == pytest.approx([0.4, 0.2])
    assert b.command(1).action.tolist() == pytest.approx([0.4, 0.2])


def test_velocities_go_on_during_a_hold_and_are_brought_to_zero_by_the_stop():
    space = ActionSpace.from_limits(LOW, HIGH, switches=[1], kind=DofKind.VELOCITY, stop_steps=4)
    b = ChunkBuffer(space, 2, ChunkOptions(max_holds=1))
    b.put(chunk(0, rows=1, value=0.8, gripper=1))
    speeds = [motion(b.command(s)) for s in range(7)]
    assert speeds == pytest.approx([0.8, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0])
    assert b.command(7).action[1] == 1


def test_a_stop_chunk_decelerates_from_what_is_played_and_forgets_the_plans_before_it():
    b = ChunkBuffer(ActionSpace.from_limits(LOW, HIGH, switches=[1], stop_steps=4), 2)
    b.put(chunk(0, rows=8, value=0.4))
    b.command(0)
    b.put(chunk(1, rows=2, chunk_id=1, provenance=Provenance.HOLD, rung=Rung.STOP))
    commands = [b.command(s) for s in range(1, 5)]
    assert [motion(c) for c in commands] == pytest.approx([0.3, 0.2, 0, 0])  # then it holds: the plan has two rows
    assert b.rung_counts[Rung.STOP] == 2
    b.put(chunk(5, chunk_id=2, value=0.3))
    assert motion(b.command(5)) == pytest.approx(0.3)
    assert b.holds_in_a_row == 0


def test_holds_consume_nothing_so_a_chunk_is_entered_where_the_arm_is():
    b = buffer()
    b.put(chunk(0, rows=2))
    for step in range(8):
        b.command(step)  # holds from step 2 on
    assert b.consumed_since(1) == 1
    assert b.put(chunk(1, rows=4, chunk_id=1))  # seen before the last action: that one is consumed
    commands = [b.command(s) for s in range(8, 11)]
    assert [c.row for c in commands] == [1, 2, 3]
    for step in range(11, 16):
        b.command(step)
    assert b.put(chunk(13, rows=4, chunk_id=2))  # seen while it stood
    assert b.command(16).row == 0
    assert (b.num_shifted, b.num_stale) == (2, 0)


def test_a_world_that_moves_by_itself_waits_for_nobody():
    b = buffer(is_shifted_by_holds=False)
    for step in range(5):
        b.command(step)
    assert not b.put(chunk(1))
    assert b.put(chunk(2))
    assert b.command(5).row == 3
    assert b.num_shifted == 0


def test_velocities_go_on_during_a_hold_so_their_steps_count():
    b = ChunkBuffer(ActionSpace.from_limits(LOW, HIGH, switches=[1], kind=DofKind.VELOCITY), 2)
    b.put(chunk(0, rows=1, value=0.8))
    for step in range(4):
        b.command(step)
    b.put(chunk(1, chunk_id=1))
    assert b.command(4).row == 3


def test_another_instruction_leaves_no_remainder_and_no_history_of_the_old_one():
    b = buffer()
    b.put(chunk(0, rows=8))
    b.put(chunk(1, rows=1, chunk_id=1, instruction="stay"))
    assert b.history(2, "go") is None
    b.command(1)
    assert b.command(2).provenance is Provenance.HOLD


def test_actions_are_clipped_to_the_limits():
    b = buffer()
    b.put(chunk(0, value=7))
    assert b.command(0).action[0] == 1


def test_history_counts_the_tokens_before_the_new_observation():
    b = buffer()
    assert b.history(0) is None
    b.put(chunk(2, chunk_id=1))
    for step, consumed in ((2, 0), (3, 2), (5, 6), (9, 8)):
        history = b.history(step)
        assert history is not None
        assert history.consumed == consumed
        assert history.tokens.tolist() == list(range(10, 18))


def test_a_chunk_without_tokens_does_not_hide_the_history():
    b = buffer()
    b.put(chunk(0))
    b.put(chunk(1, chunk_id=1, tokens=np.empty(0, np.int32), provenance=Provenance.HOLD, rung=Rung.HOLD))
    history = b.history(2)
    assert history is not None
    assert history.consumed == 4


def test_a_step_is_played_once():
    b = buffer()
    b.command(3)
    with pytest.raises(AssertionError, match="played already"):
        b.command(3)


def test_options_say_what_is_valid():
    with pytest.raises(BadConfig, match="max_chunks is 0"):
        ChunkOptions(max_chunks=0)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.integers(0, 12), st.integers(1, 8)),  # age of its observation, rows
        st.tuples(st.just("freeze"), st.integers(0, 6), st.just(0)),
        *[st.tuples(st.just("play"), st.integers(0, 2), st.just(0))] * 2,  # steps that are skipped
    ),
    min_size=10,
    max_size=60,
)


@settings(max_examples=200)
@given(OPERATIONS, st.sampled_from(list(HandOver)))
def test_it_always_answers_never_with_an_action_of_the_past_and_time_goes_on(operations, hand_over):
    """Whatever arrives in whatever order: the command of step s was meant for step s."""
    b = buffer(hand_over=hand_over, is_shifted_by_holds=False)
    by_id, step, last_planned = {}, 0, -1
    for kind, number, rows in operations:
        if kind == "put":
            new = chunk(max(0, step - number), rows, chunk_id=len(by_id))
            by_id[len(by_id)] = new
            b.put(new)
        elif kind == "freeze":
            b.freeze(step, number)
        else:
            step += number
            command = b.command(step)
            if command.provenance is Provenance.HOLD:
                assert motion(command) == 0
            else:
                assert motion(command) == round(step / 100, 6)  # also every mean of rows meant for this step
                meant_for = by_id[command.chunk_id].observation_step + command.row
                assert meant_for == step > last_planned
                last_planned = meant_for
            step += 1
    assert sum(b.counts.values()) == sum(b.rung_counts.values())
    assert sum(b.gap_counts.values()) == b.counts[Provenance.HOLD]


@settings(max_examples=200)
@given(OPERATIONS, st.sampled_from(list(HandOver)))
def test_the_arm_is_never_sent_ahead_of_where_it_is(operations, hand_over):
    """Position commands, the pose being the number of actions consumed: each command is the next pose, or a hold.

    A plan says: from the pose that was observed, one further with every action. Observations arrive late and in any
    order; the arm starves in between.
    """
    positions = ActionSpace.from_limits(np.full(2, -1000), np.full(2, 1000), kind=DofKind.POSITION)
    b = ChunkBuffer(positions, 2, ChunkOptions(hand_over=hand_over, max_holds=3))
    pose, step, pose_at = 0, 0, {}
    for kind, number, rows in operations:
        pose_at[step] = pose
        if kind == "put":
            seen = max(0, step - number)
            actions = np.repeat(pose_at[seen] + 1 + np.arange(rows, dtype=np.float32)[:, None], 2, 1)
            b.put(chunk(seen, rows, chunk_id=step, actions=actions))
        elif kind == "freeze":
            b.freeze(step, number)
        else:
            command = b.command(step)
            if command.provenance is Provenance.HOLD:
                assert command.action[0] == pose
            else:
                pose += 1
                assert command.action[0] == pytest.approx(pose)
            step += 1


@given(st.floats(0.1, 1), st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=2), min_size=1, max_size=9))
def test_bounded_rows_stay_in_the_limits_and_make_no_jumps(slowdown, rows):
    before = np.array([0.1, -1], np.float32)
    bounded = SPACE.bound(np.array(rows, np.float32), before, slowdown)
    assert (abs(bounded) <= 1).all()
    assert (abs(np.diff(np.vstack((before, bounded))[:, 0])) <= SPACE.max_change[0] + 1e-6).all()
    assert (bounded[:, 1] == -1).all()  # the switch is kept


def test_bounding_slows_down_geometrically():
    rows = np.full((3, 2), 0.4, np.float32)
    before = np.array([0.4, 1], np.float32)
    assert SPACE.bound(rows, before, 0.5)[:, 0].tolist() == pytest.approx([0.2, 0.1, 0.05])
    assert SPACE.bound(rows, None, 0.5)[0].tolist() == pytest.approx([0.2, 0.4])


def test_bounding_positions_shrinks_the_increments():
    space = ActionSpace.from_limits(LOW, HIGH, kind=DofKind.POSITION)
    rows = np.array([[0.2, 0], [0.3, 0], [0.4, 0]], np.float32)
    bounded = space.bound(rows, np.array([0.1, 0], np.float32), 0.5)
    assert bounded[:, 0].tolist() == pytest.approx([0.15, 0.175, 0.1875])


def test_action_space_refuses_limits_that_contradict():
    with pytest.raises(BadConfig, match="must be below high"):
        ActionSpace.from_limits(HIGH, LOW)
    with pytest.raises(BadConfig, match=r"valid: 0\.\.1"):
        ActionSpace.from_limits(LOW, HIGH, switches=[2])


def test_delay_is_a_quantile_of_a_window_and_forgets_a_slow_plan():
    delay = DelayEstimator(quantile=0.5, window=4, warmup=1, initial=2)
    assert delay.steps(8) == 2
    delay.record(50)  # warming up
    assert delay.steps(8) == 2
    for steps in (3, 7, 3, 3):
        delay.record(steps)
    assert delay.steps(8) == 3
    assert delay.steps(1) == 1  # never more than there are actions
    delay.record(9)
    delay.record(9)
    assert delay.steps(100) == 9  # window 3, 3, 9, 9


def test_a_hold_that_a_chunk_planned_names_its_chunk_and_row():
    b = buffer()
    b.put(chunk(0, rows=2, chunk_id=7, provenance=Provenance.HOLD, rung=Rung.HOLD))
    assert [(c.provenance, c.chunk_id, c.row) for c in (b.command(0), b.command(1))] == [
        (Provenance.HOLD, 7, 0),
        (Provenance.HOLD, 7, 1),
    ]
