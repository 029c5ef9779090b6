"""Motion from tokens, and the controller that looks at it. Numbers are worked out by hand."""

import math

import numpy as np
import pytest
from contract.fakes import UNIT, build, toy_parts
from fake_policy import A, FakeDrafter, FakeEngine, H, T, make_policy

from vla_spec.clock import VirtualClock
from vla_spec.config import resolve
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.kinematics import Motion, PlayedSteps, boundary, mean_radius, path_length, revision, speeds, straightness
from vla_spec.ladder import Reason
from vla_spec.runtime import NO_DEADLINE_NS
from vla_spec.types import LEAVE_REST, Observation, Plan, Provenance, Round, Rung, StopReason

LONG = 1 << 60
PREFILL = Round(0, 0, 0, 0, 5, 0, 0, 5)
ROUND = Round(4, 2, 0, 1, 5, 0, 0, 6)


def tokens_of(actions, parts=None):
    parts = parts or toy_parts()
    rows = np.zeros((len(actions), 4), np.float32)
    rows[:, : np.shape(actions)[1]] = actions
    return parts.tokenizer.encode(rows)


def motion(parts=None, **options):
    parts = parts or toy_parts()
    return Motion(parts.domain, parts.tokenizer, **options)


def bins(n):
    """n bins of the toy tokenizer, in metres."""
    return n * 2 / 256 * UNIT


# ---- motion ---------------------------------------------------------------------------------------------------


def test_increments_are_in_metres_and_leave_switches_out():
    tokens = np.array([128, 138, 118, 255, 129, 128, 128, 0, 3, 4], np.int32)  # the last step has only begun
    found = motion().increments(tokens)
    np.testing.assert_allclose(found, [[0, bins(10), -bins(10)], [bins(1), 0, 0]], atol=1e-9)


def test_positions_move_by_their_differences():
    tokens = np.array([128, 128, 128, 0, 131, 128, 128, 0, 131, 124, 128, 0], np.int32)
    found = motion(is_delta=False).increments(tokens)
    np.testing.assert_allclose(found, [[bins(3), 0, 0], [0, -bins(4), 0]], atol=1e-9)


def test_a_robot_of_switches_only_is_refused():
    parts = toy_parts(num_dofs=1)
    with pytest.raises(BadConfig, match="every degree of freedom is a switch"):
        Motion(parts.domain, parts.tokenizer)


def test_path_radius_and_straightness_of_a_straight_line():
    line = np.tile([3.0, 4.0, 0.0], (4, 1))  # positions 0, 5, 10, 15, 20 on a line
    assert speeds(line).tolist() == [5.0] * 4
    assert path_length(line) == 20.0
    assert mean_radius(line) == pytest.approx((10 + 5 + 0 + 5 + 10) / 5)
    assert straightness(line) == pytest.approx(1.0)


def test_a_square_is_curved_and_stays_in_its_plane():
    square = np.array([[1.0, 0, 1], [0, 1, 0], [-1, 0, -1], [0, -1, 0]])
    assert straightness(square) == pytest.approx(0.0, abs=1e-12)
    corners = np.array([[0, 0], [math.sqrt(2), 0], [math.sqrt(2), 1], [0, 1], [0, 0]])  # in the plane that they span
    centred = corners - corners.mean(axis=0)
    assert mean_radius(square) == pytest.approx(np.sqrt((centred**2).sum(axis=1)).mean())


def test_standing_still_is_no_motion():
    still = np.zeros((5, 3))
    assert (path_length(still), mean_radius(still), straightness(still), boundary(still, 1, 1)) == (0, 0, 0, 0)
    assert boundary(np.zeros((0, 3)), 1, 1) == 0


def test_the_boundary_weighs_radius_and_length_and_is_clipped():
    line = np.tile([3.0, 4.0, 0.0], (4, 1))
    assert boundary(line, 12, 40, 0.5) == pytest.approx(0.5 * 6 / 12 + 0.5 * 20 / 40)
    assert boundary(line, 12, 40, 1.0) == pytest.approx(0.5)
    assert boundary(line, 1, 1, 0.3) == 1.0


def test_revision_sums_over_the_steps_that_both_plans_have():
    before, after = np.array([[1.0, 0], [2, 0], [3, 0]]), np.array([[1.0, 1], [0, 0]])
    assert revision(before, after) == 3.0
    assert revision(before, after[:0]) == 0.0


def test_played_steps_are_counted_once_and_forgotten_with_the_motion():
    parts = toy_parts()
    played = PlayedSteps(motion(parts), 4, window=3)
    first = tokens_of([[0.1, 0, 0]] * 8, parts)
    played.update(ChunkHistory(first, 8))
    assert (played.num_steps, len(played.increments), len(played.planned)) == (2, 2, 6)
    played.update(ChunkHistory(first, 20))  # no newer chunk came: three more steps of the same one
    assert (played.num_steps, len(played.increments), len(played.planned)) == (5, 3, 3)
    assert played.revision is None
    played.update(ChunkHistory(tokens_of([[0.2, 0, 0]] * 8, parts), 4))
    assert played.num_steps == 6
    step = played.increments[-1, 0] - played.increments[0, 0]
    assert played.revision == pytest.approx(3 * step)  # the old plan's last three steps were planned anew
    played.update(None)
    assert (played.num_steps, len(played.increments), played.revision) == (0, 0, None)


@pytest.mark.parametrize(("size", "consumed"), [(0, 0), (3, 2), (3, 1000), (32, -5)])
def test_odd_histories_do_no_harm(size, consumed):
    played = PlayedSteps(motion(), 4, window=3)
    played.update(ChunkHistory(np.full(size, 130, np.int32), consumed))
    assert played.num_steps == 0
    assert played.planned.shape[1] == 3


# ---- the controller -------------------------------------------------------------------------------------------


def controller(parts=None, **options):
    return build("controller", "kinematic", parts or toy_parts(), **{"slow": 0.001, "fast": 0.006, **options})


def tolerance(made, history):
    assert made.begin(LONG, history)
    made.record(PREFILL)
    return made.plan(LONG, 20).tolerance


def history_of(actions, consumed=0):
    return ChunkHistory(tokens_of(actions), consumed)


def speed_of(action):
    return float(speeds(motion().increments(tokens_of([action])))[0])


def test_speed_is_a_ramp_between_slow_and_fast():
    slow, fast = speed_of([0.1, 0, 0]), speed_of([0.5, 0, 0])
    made = controller(slow=slow, fast=fast, least=0.2)
    middle = speed_of([0.3, 0, 0])
    for action, share in (([0.05, 0, 0], 0.0), ([0.3, 0, 0], (middle - slow) / (fast - slow)), ([0.9, 0, 0], 1.0)):
        assert tolerance(made, history_of([action] * 8)) == pytest.approx(0.2 + 0.8 * share)


def test_speed_looks_at_the_steps_that_are_still_planned():
    """Fast so far, slow from now on: it is about to touch something."""
    plan = [[0.9, 0, 0]] * 4 + [[0.01, 0, 0]] * 4
    made = controller(least=0.0)
    assert tolerance(made, history_of(plan, consumed=16)) == 0.0
    assert tolerance(made, history_of(plan, consumed=0)) > 0.3


def test_an_unknown_motion_is_a_slow_one():
    for schedule in ("speed", "curvature", "boundary", "revision"):
        assert tolerance(controller(schedule=schedule, least=0.3), None) == pytest.approx(0.3)


def test_curvature_tightens_where_the_plan_turns():
    straight, turning = [[0.9, 0, 0]] * 8, [[0.9, 0, 0]] * 4 + [[-0.9, 0, 0]] * 4
    made = controller(schedule="curvature", least=0.0)
    assert tolerance(made, history_of(straight)) == pytest.approx(1.0)
    assert tolerance(made, history_of(turning)) == pytest.approx(0.0, abs=0.02)
    assert tolerance(controller(schedule="speed", least=0.0), history_of(turning)) == pytest.approx(1.0)


def test_time_is_kervs_released_schedule():
    """3 + 12 exp(-(step / tau)^3) of 15 bins, tau = T / ln(1e30)^(1/3), T = 200 steps."""
    made = controller(schedule="time", least=0.2, duration=200)
    tau = 200 / math.log(1e30) ** (1 / 3)
    assert tolerance(made, None) == pytest.approx(1.0)
    for chunk in range(1, 40):
        found = tolerance(made, ChunkHistory(np.full(32, chunk, np.int32), 16))  # four steps of each were played
        assert found == pytest.approx((3 + 12 * math.exp(-((4 * chunk / tau) ** 3))) / 15)
    assert found == pytest.approx(0.2, abs=1e-6)
    assert tolerance(made, None) == pytest.approx(1.0)


def test_boundary_is_heisds_measure_of_the_steps_played():
    made = controller(schedule="boundary", least=0.0, radius=0.01, length=0.05, window=15)
    plan = [[0.5, 0.2, 0]] * 8
    expected = boundary(motion().increments(tokens_of(plan))[:4], 0.01, 0.05)
    assert 0.1 < expected < 0.9
    assert tolerance(made, history_of(plan, consumed=16)) == pytest.approx(expected)
    assert tolerance(controller(schedule="boundary", least=0.0), history_of(plan, consumed=0)) == 0.0


def test_revision_tightens_where_a_new_plan_corrects_the_old_one():
    made = controller(schedule="revision", least=0.0, revised=0.004, sharpness=2.0)
    assert tolerance(made, history_of([[0.5, 0, 0]] * 8, consumed=16)) == 0.0  # nothing to compare with yet
    assert tolerance(made, history_of([[0.5, 0, 0]] * 7 + [[0.6, 0, 0]], consumed=16)) == pytest.approx(1.0)
    changed = 4 * (speed_of([0.6, 0, 0]) - speed_of([0.5, 0, 0]))  # 1 of 4 steps, then 3 of 4 change back
    last = tolerance(made, history_of([[0.5, 0, 0]] * 8, consumed=16))
    assert last == pytest.approx(math.exp(-((changed / 4 / 0.004) ** 2)), rel=1e-4)


def test_the_base_controller_sizes_drafts_and_stops():
    parts = toy_parts()
    made = controller(parts, base={"name": "fixed", "gamma": 12, "depth": 4, "top_k": 3, "tolerance": 0.5}, least=0.2)
    made.begin(LONG, None)
    made.record(PREFILL)
    assert made.plan(LONG, 20) == Plan(12, 4, 3, pytest.approx(0.1))
    assert made.plan(0, 20) is None
    assert not made.begin(-1, None)
    deadline = build("controller", "deadline", parts)
    wrapped = controller(parts, base="deadline")
    for one in (deadline, wrapped):
        one.begin(LONG, None)
        one.record(PREFILL)
    for _ in range(5):
        plain, own = deadline.plan(LONG, 20), wrapped.plan(LONG, 20)
        assert own[:3] == plain[:3]
        deadline.record(ROUND)
        wrapped.record(ROUND)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "kinematic"}, "base must be a controller that sizes drafts"),
        ({"least": 1.5}, r"least must be in \[0, 1\], got 1.5"),
        ({"slow": 0.01, "fast": 0.005}, "need 0 <= slow < fast, got 0.01 and 0.005"),
        ({"window": 0}, "window must be more than 0, got 0"),
        ({"leave_after": 0}, "leave_after must be more than 0"),
        ({"leave_steps": -1}, "leave_steps must be 0 or more"),
        ({"leave_pause": 0}, "leave_pause must be more than 0"),
        ({"base": {"gamma": 3}}, "base: expected a name"),
    ],
)
def test_options_that_can_not_be_right(options, message):
    with pytest.raises(BadConfig, match=message):
        controller(**options)


def test_errors_in_the_base_name_their_path():
    tree = {"engine": "toy", "robot": "toy", "controller": {"name": "kinematic", "base": {"name": "fixed", "gama": 3}}}
    with pytest.raises(BadConfig, match=r"controller: base.gama: no option named 'gama'.*did you mean 'gamma'"):
        resolve(tree)


# ---- leaving the rest to the drafter --------------------------------------------------------------------------


def leaving(**options):
    return controller(**{"leave_steps": 8, "leave_after": 2, "leave_pause": 2, "schedule": "time", **options})


def chunk(made, history, num_rounds=5):
    """Plays one chunk; True if the controller left the rest of it."""
    made.begin(LONG, history)
    made.record(PREFILL)
    for done in range(num_rounds):
        plan = made.plan(LONG, 20)
        if plan.gamma < 0:
            assert plan == LEAVE_REST
            assert done == 2
            return True
        made.record(ROUND)
    return False


def test_chunks_are_left_after_so_many_rounds_and_never_twice_in_a_row():
    made = leaving()
    history = ChunkHistory(np.full(32, 130, np.int32), 0)
    assert not chunk(made, None), "the first chunk of a motion is verified whole"
    assert [chunk(made, history) for _ in range(7)] == [True, False, False, True, False, False, True]
    assert made.num_left == 3


def test_chunks_are_left_only_where_the_arm_is_fast():
    made = leaving(schedule="speed", leave_above=0.5, leave_pause=1)
    fast, slow = history_of([[0.9, 0, 0]] * 8), history_of([[0.01, 0, 0]] * 8)
    assert [chunk(made, history) for history in (slow, slow, fast, slow, fast)] == [False, False, True, False, True]


def test_no_more_is_left_than_so_many_steps():
    made = leaving(leave_steps=2)
    made.begin(LONG, ChunkHistory(np.full(32, 130, np.int32), 0))
    for measured in (PREFILL, ROUND, ROUND):
        made.record(measured)
    assert [made.plan(LONG, left).gamma < 0 for left in (20, 9, 8, 1)] == [False, False, True, True]


def test_without_time_it_stops_and_does_not_leave():
    made = leaving()
    made.begin(LONG, ChunkHistory(np.full(32, 130, np.int32), 0))
    made.record(PREFILL)
    made.record(ROUND)
    made.record(ROUND)
    assert made.plan(0, 20) is None


def test_what_is_left_is_drafted_bounded_and_labelled():
    """Through the policy: two verified steps, the drafter's tokens behind them, rung and reason say so."""
    clock = VirtualClock()
    wanted = np.tile([200, 128, 128, 255], H).astype(np.int32)
    made = leaving(leave_after=1, base={"name": "fixed", "gamma": 7})
    policy = make_policy(clock, FakeEngine(clock, tokens=wanted), FakeDrafter(wanted), made)
    seen = Observation(np.zeros((3, 4, 4, 3), np.uint8), np.zeros(4, np.float32), "go", 0, 0)
    history = ChunkHistory(wanted, 16)
    answer = policy.plan(seen, NO_DEADLINE_NS, history)
    assert policy.last_record.reason is Reason.LEFT
    assert answer.rung is Rung.DRAFT_TAIL
    provenance = answer.provenance.reshape(-1)
    assert provenance.tolist() == [Provenance.EXACT] * 9 + [Provenance.DRAFTED] * 23
    verified = 9 // A
    exact = policy.adapter.decode(wanted)
    np.testing.assert_allclose(answer.actions[:verified], exact[:verified])
    assert (np.abs(answer.actions[verified:, 0]) < np.abs(exact[verified:, 0])).all()  # slowed down
    assert (np.abs(np.diff(answer.actions[:, 0])) <= policy.space.max_change[0] + 1e-6).all()
    again = policy.plan(seen, NO_DEADLINE_NS, history)
    assert (policy.last_record.reason, again.rung) == (Reason.NONE, Rung.EXACT)
    assert len(again.tokens) == T


def test_the_decoder_says_that_it_was_told_to_leave():
    clock = VirtualClock()
    made = leaving(leave_after=1, base={"name": "fixed", "gamma": 7})
    policy = make_policy(clock, FakeEngine(clock), FakeDrafter(), made)
    decoded = policy.decoder.decode({}, NO_DEADLINE_NS, ChunkHistory(np.zeros(T, np.int32), 0))
    assert decoded.stop is StopReason.LEFT
    assert len(decoded.tokens) == 2


def test_cost_tables_know_the_shape_of_the_base_controllers_trees():
    from vla_spec.calib.identity import draft_shape

    base = {"name": "fixed", "gamma": 31, "depth": 4, "top_k": 8}
    config = resolve({"engine": "toy", "robot": "toy", "controller": {"name": "kinematic", "base": base}})
    assert draft_shape(config)[1:3] == (4, 8)
    config = resolve({"engine": "toy", "robot": "toy", "controller": {"name": "kinematic", "base": "fixed"}})
    assert draft_shape(config)[1:3] == (0, 1)
