"""Hand-over between chunks: exact prefix forcing, the seam, and known failures of others as tests."""

from pathlib import Path

import numpy as np
import pytest
from contract.fakes import TableEngine, build, greedy_path, toy_engine, toy_inputs, toy_parts, tree_drafter
from fake_policy import (
    MS,
    SPACE,
    TOKENIZER,
    A,
    FakeController,
    FakeDrafter,
    FakeEngine,
    H,
    T,
    make_policy,
)

from vla_spec import plugins
from vla_spec.action_space import ActionSpace, DofKind
from vla_spec.chunks import ChunkBuffer, ChunkOptions, HandOver
from vla_spec.clock import VirtualClock
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.delay import DelayEstimator
from vla_spec.interfaces import ChunkHistory
from vla_spec.ladder import Ladder, LadderOptions, Reason
from vla_spec.policy import PolicyOptions
from vla_spec.robots.toy import ToyRobot
from vla_spec.runtime import Actor, Mode, Planner, RuntimeOptions, run_episode
from vla_spec.types import ActionChunk, Observation, Provenance, Rung, Scores, StopReason

LATER = 10**12
MODEL = Path(__file__).parents[1] / "models" / "metaworld"
PLANNED = np.arange(T, dtype=np.int32) + 100
OLD = np.arange(T, dtype=np.int32) + 50
FROZEN = ChunkOptions(hand_over=HandOver.FROZEN_PREFIX)


# --- the decoder: what follows the forced tokens is plain decoding behind them ---


def plain_behind(engine, inputs, forced, num_tokens):
    """Autoregressive decoding behind given tokens, one token at a time, with nothing of ours but the engine."""
    scores, tokens = engine.prefill(inputs), []
    for i in range(num_tokens):
        tokens.append(int(forced[i]) if i < len(forced) else int(scores.logits[-1].argmax()))
        scores = engine.step(np.array(tokens[-1:], np.int32), np.array([-1], np.int32))
        engine.commit(np.zeros(1, np.int32))
    return np.array(tokens, np.int32)


def make_decoder(engine, drafter, parts, num_tokens=T, **plan):
    controller = build("controller", "fixed", parts, **({"gamma": 8} | plan))
    rule = build("rule", "greedy", parts)
    return SpeculativeDecoder(engine, drafter, rule, controller, num_tokens, lambda: 0, np.random.default_rng(0))


@pytest.mark.parametrize("num_forced", [1, 4, 12, 31])
@pytest.mark.parametrize("shape", ["none", "chain", "tree"])
def test_behind_the_prefix_it_is_plain_decoding_on_the_toy_engine(num_forced, shape):
    parts = toy_parts()
    engine, other = toy_engine(parts, surprise=0.4), toy_engine(parts, surprise=0.4)
    free = greedy_path(other, toy_inputs(), T)
    forced = ((free[:num_forced] + 7) % 256).astype(np.int32)  # not what the target would have said
    truth = plain_behind(other, toy_inputs(), forced, T)
    rng = np.random.default_rng(1)
    drafter = {
        "none": build("drafter", "none", parts),
        "chain": build("drafter", "previous_chunk", parts),
        "tree": tree_drafter(rng, 256, lambda before: int(truth[len(before)]) if len(before) < T else 0),
    }[shape]
    made = make_decoder(engine, drafter, parts)
    history = ChunkHistory(truth, 0)
    decoded = made.decode(toy_inputs(), LATER, history, forced)
    np.testing.assert_array_equal(decoded.tokens, truth)
    assert num_forced == 31 or (truth[num_forced:] != free[num_forced:]).any()  # the prefix matters
    assert (decoded.provenance[:num_forced] == Provenance.TAIL).all()
    assert (decoded.provenance[num_forced:] == Provenance.EXACT).all()
    assert decoded.stop is StopReason.COMPLETE
    assert [r.num_forced for r in decoded.rounds[:3]] == [0, num_forced, 0][: len(decoded.rounds)]
    assert sum(r.num_accepted + 1 for r in decoded.rounds[1:]) >= T - num_forced
    if shape != "none" and num_forced < 31:
        assert len(decoded.rounds) < 2 + T - num_forced - 1
    np.testing.assert_array_equal(made.decode(toy_inputs(), LATER, history).tokens, free)  # and nothing stays behind


def test_a_prefix_longer_than_a_step_is_fed_in_pieces():
    parts = toy_parts()
    forced = np.arange(20, dtype=np.int32) * 5
    truth = plain_behind(toy_engine(parts), toy_inputs(), forced, T)
    made = make_decoder(toy_engine(parts, max_step=8), build("drafter", "previous_chunk", parts), parts)
    np.testing.assert_array_equal(made.decode(toy_inputs(), LATER, ChunkHistory(truth, 0), forced).tokens, truth)


def test_the_prefix_costs_one_forward_and_tells_the_controller_nothing():
    recorded, sizes = [], []

    class Counting(TableEngine):
        def step(self, tokens, parents):
            sizes.append(len(tokens))
            return super().step(tokens, parents)

    class Listening(FakeController):
        def record(self, measured):
            recorded.append(measured)

    parts = toy_parts(6)
    made = make_decoder(Counting(6, seed=3), build("drafter", "none", parts), parts, num_tokens=8)
    made.controller = Listening()
    decoded = made.decode({}, LATER, None, np.array([1, 2, 3, 4], np.int32))
    assert sizes == [4, 1, 1, 1]  # the first one also says the fifth token
    assert [r.num_forced for r in decoded.rounds] == [0, 4, 0, 0, 0]
    assert recorded == [r for r in decoded.rounds if not r.num_forced]


def test_trouble_at_the_prefix_is_a_value():
    clock = VirtualClock()
    forced = PLANNED[:8]

    def decode(engine, deadline_ns=LATER):
        policy = make_policy(clock, engine)
        return policy.decoder.decode({}, deadline_ns, None, forced)

    bad = decode(FakeEngine(clock, nan_at=0))
    assert (bad.stop, len(bad.tokens)) == (StopReason.BAD_SCORES, 0)
    bad = decode(FakeEngine(clock, nan_at=8))
    assert (bad.stop, bad.tokens.tolist()) == (StopReason.BAD_SCORES, forced.tolist())
    late = decode(FakeEngine(clock, prefill_ns=100), clock.now_ns() + 50)  # nothing of it would be in time
    assert (late.stop, len(late.tokens), len(late.rounds)) == (StopReason.DEADLINE, 0, 1)
    with pytest.raises(AssertionError, match="32 of 32 tokens forced"):
        make_policy(clock).decoder.decode({}, LATER, None, PLANNED)


@pytest.fixture(scope="module")
def shipped():
    """Adapter and parts of the shipped policy."""
    pytest.importorskip("onnxruntime", reason="needs the extra [run]")
    if not (MODEL / "decoder.onnx").exists():
        pytest.skip("needs the shipped weights")
    from vla_spec.adapters import vla

    adapter = vla.load(MODEL)
    plugin = plugins.load("engine", "onnxruntime")
    engine = plugin.build(plugin.options(), plugins.Parts(adapter.domain, adapter.tokenizer, MODEL))
    return adapter, plugins.Parts(adapter.domain, adapter.tokenizer, MODEL, engine)


@pytest.mark.parametrize("drafter", ["none", "previous_chunk", "ngram", "jacobi", "block_head", "feature_head"])
def test_behind_the_prefix_it_is_plain_decoding_on_the_shipped_policy(shipped, drafter):
    """Also the drafters that keep state: they meet a prefix that they never saw being decoded."""
    adapter, parts = shipped
    engine = parts.target
    with np.load(MODEL / "golden.npz", allow_pickle=False) as golden:
        inputs = {name: golden[name] for name in ("images", "words", "state")}
    made = make_decoder(engine, build("drafter", drafter, parts), parts, adapter.domain.num_tokens, gamma=12)
    old = made.decode(inputs, LATER).tokens
    moved = {**inputs, "state": inputs["state"] + np.float32(0.03)}
    history = ChunkHistory(old, 16)
    for num_forced in (4, 12):
        forced = old[16 : 16 + num_forced]
        truth = plain_behind(engine, moved, forced, adapter.domain.num_tokens)
        decoded = made.decode(moved, LATER, history, forced)
        np.testing.assert_array_equal(decoded.tokens, truth)
        np.testing.assert_array_equal(decoded.tokens[:num_forced], forced)


# --- the policy: labels, and what is forced ---


def observe(step=0, instruction="go"):
    return Observation(np.zeros((3, 8, 8, 3), np.uint8), np.zeros(4, np.float32), instruction, 900, step)


@pytest.fixture
def clock():
    return VirtualClock(1000)


def test_forced_actions_are_labelled_as_old_and_the_rung_is_about_the_rest(clock):
    policy = make_policy(clock)
    chunk = policy.plan(observe(step=4), LATER, ChunkHistory(OLD, 4 * A, 2 * A))
    assert chunk.rung is Rung.EXACT
    assert chunk.tokens.tolist() == [*OLD[16:24], *PLANNED[8:]]
    assert chunk.provenance[:, 0].tolist() == [Provenance.TAIL] * 2 + [Provenance.EXACT] * 6
    np.testing.assert_array_equal(chunk.actions[:2], TOKENIZER.decode(OLD)[4:6])
    record = policy.last_record
    assert (record.num_verified, record.num_tokens) == (T - 8, T)
    assert record.rounds[1].num_forced == 8
    assert policy.trace.summary().tokens_per_forward == pytest.approx((T - 8) / len(record.rounds))


def test_a_cut_behind_the_prefix_counts_judged_steps_only(clock):
    def cut(num_tokens, **options):
        controller = FakeController(stop_at=T - num_tokens)
        return make_policy(clock, None, None, controller, options=PolicyOptions(reserve_ns=0, **options))

    history = ChunkHistory(OLD, 3 * A, 2 * A)
    policy = cut(11)  # two forced steps, then three tokens: no step that the target has judged
    chunk = policy.plan(observe(step=3), LATER, history)
    assert (chunk.rung, policy.last_record.reason, policy.last_record.num_verified) == (
        Rung.LAST_CHUNK,
        Reason.DEADLINE,
        0,
    )
    assert chunk.tokens.tolist() == OLD[12:].tolist()
    policy = cut(13)  # one judged step, then the previous chunk's last two
    chunk = policy.plan(observe(step=3), LATER, history)
    assert (chunk.rung, policy.last_record.num_verified) == (Rung.DRAFT_TAIL, 5)
    assert chunk.provenance[:, 0].tolist() == [3, 3, 0, 3, 3]
    policy = cut(5, min_steps=0)  # not even the prefix was fed
    assert policy.plan(observe(step=3), LATER, history).rung is Rung.LAST_CHUNK


def test_at_least_one_step_is_left_to_decide(clock):
    policy = make_policy(clock)
    chunk = policy.plan(observe(), LATER, ChunkHistory(OLD, 0, T))
    assert chunk.provenance[:, 0].tolist() == [Provenance.TAIL] * (H - 1) + [Provenance.EXACT]
    assert make_policy(clock).plan(observe(), LATER, ChunkHistory(OLD, T, 8)).tokens.tolist() == PLANNED.tolist()


def test_what_is_forced_is_what_the_arm_plays_not_what_was_drafted(clock):
    """The tail of a cut chunk is slowed down: the tokens nearest to the slower actions are forced."""
    policy = make_policy(clock, drafter=FakeDrafter(PLANNED + 40), controller=FakeController(stop_at=T - 10))
    old = policy.plan(observe(), LATER)
    assert old.rung is Rung.DRAFT_TAIL
    assert (TOKENIZER.decode(old.tokens)[4:6] != old.actions[4:6]).any()
    policy = make_policy(clock)
    chunk = policy.plan(observe(step=4), LATER, ChunkHistory(old.tokens, 4 * A, 2 * A, old.actions))
    half_bin = 1 / 256 + 1e-6
    assert (abs(chunk.actions[:2] - old.actions[4:6]) <= half_bin).all()
    assert chunk.rung is Rung.EXACT


def test_the_remainder_of_a_bounded_tail_stays_bounded(clock):
    """A plan that fails after a cut one must not play the unverified tail at full speed."""
    policy = make_policy(clock, drafter=FakeDrafter(PLANNED + 40), controller=FakeController(stop_at=T - 10))
    old = policy.plan(observe(), LATER)
    chunk = policy.plan(observe(step=3, instruction=""), LATER, ChunkHistory(old.tokens, 3 * A, 0, old.actions))
    assert chunk.rung is Rung.LAST_CHUNK
    np.testing.assert_array_equal(chunk.actions, old.actions[3:])


def test_nothing_is_forced_while_the_ladder_is_stopped(clock):
    policy = make_policy(clock, ladder=Ladder(LadderOptions(max_holds=0, recover_after=1)))
    assert policy.plan(observe(instruction=""), LATER).rung is Rung.STOP
    chunk = policy.plan(observe(step=4), LATER, ChunkHistory(OLD, 16, 8))
    assert (chunk.rung, chunk.tokens.tolist()) == (Rung.EXACT, PLANNED.tolist())


# --- the buffer: when there is something to continue ---


def chunk_of(step, rows=H, chunk_id=0, actions=None, rung=Rung.EXACT, provenance=Provenance.EXACT, instruction="go"):
    actions = np.full((rows, A), 0.1, np.float32) if actions is None else actions
    tokens = np.arange(rows * A, dtype=np.int32) if rung < Rung.HOLD else np.empty(0, np.int32)
    return ActionChunk(
        actions, np.full((rows, A), provenance, np.uint8), rung, chunk_id, instruction, 1000 + step, step, 0, 0, 0,
        tokens,
    )  # fmt: skip


def playing(*chunks, until=0, options=FROZEN):
    b = ChunkBuffer(SPACE, A, options)
    for new in chunks:
        b.put(new)
    for step in range(until):
        b.command(step)
    return b


def test_what_is_frozen_is_what_the_chunk_still_has():
    b = playing(chunk_of(0), until=5)
    assert b.freeze(5, 9, "go") == 3  # never padded: three actions are left
    history = b.history(5, "go", 3)
    assert (history.consumed, history.num_forced) == (20, 12)
    assert b.freeze(5, 0, "go") == 0
    assert playing(until=3).freeze(3, 2) == 0


def test_another_order_is_never_forced_to_continue_the_old_one():
    b = playing(chunk_of(0), until=2)
    assert b.freeze(2, 3, "stay") == 0
    b.put(chunk_of(2, chunk_id=1, instruction="stay"))
    assert b.command(2).chunk_id == 1  # and nothing of the old one is frozen


def test_nothing_is_forced_after_a_hold_or_a_stop():
    held = playing(chunk_of(0, rows=2), until=4)
    held.put(chunk_of(0, chunk_id=1))  # came late, two of its actions are consumed
    assert held.freeze(4, 3, "go") == 0  # the arm stands
    held.command(4)
    assert held.freeze(5, 3, "go") == 3  # now it moves
    stopped = playing(chunk_of(0), chunk_of(2, chunk_id=1, rung=Rung.STOP, provenance=Provenance.HOLD), until=2)
    assert stopped.freeze(2, 3, "go") == 0


def test_the_other_modes_force_nothing():
    for hand_over in (HandOver.REPLACE, HandOver.TEMPORAL_ENSEMBLE):
        assert playing(chunk_of(0), until=2, options=ChunkOptions(hand_over=hand_over)).freeze(2, 3, "go") == 0


# --- the loop: the seam ---


class Walk:
    """Each number goes on from the action before it, one bin per step; the first action depends on the picture."""

    info, features, max_step = None, None, 32

    def __init__(self, clock, prefill_ns=0, step_ns=0, spread=40):
        self.clock, self.prefill_ns, self.step_ns, self.spread = clock, prefill_ns, step_ns, spread
        self.rng, self.paths, self.prefix = np.random.default_rng(0), [], []

    @property
    def length(self):
        return 1 + len(self.prefix)

    def prefill(self, inputs):
        self.clock.advance(self.prefill_ns)
        self.start = 128 + int(self.rng.integers(-self.spread, self.spread + 1))
        self.prefix = []
        return self._scores([[]])

    def step(self, tokens, parents):
        self.clock.advance(self.step_ns)
        self.paths = []
        for token, parent in zip(tokens.tolist(), parents.tolist(), strict=True):
            self.paths.append((self.prefix if parent < 0 else self.paths[parent]) + [token])
        return self._scores(self.paths)

    def commit(self, path):
        self.prefix = self.paths[int(path[-1])]

    def _scores(self, paths):
        logits = np.zeros((len(paths), 256), np.float32)
        for row, path in enumerate(paths):
            logits[row, self.start if len(path) < A else min(path[-A] + 1, 255)] = 9
        return Scores(logits)


def walk(hand_over, prefill_ms=20.0, step_ms=0.4, max_steps=60, **options):
    clock = VirtualClock(500)
    engine = Walk(clock, round(prefill_ms * MS), round(step_ms * MS))
    policy = make_policy(clock, engine)
    values = {"max_steps": max_steps, "stop_on_success": False, "mode": Mode.VIRTUAL, "budget_ns": 200 * MS} | options
    chunks = ChunkOptions(hand_over=hand_over)
    return run_episode(ToyRobot(), policy, clock, RuntimeOptions(chunks=chunks, **values), 1)


def largest_jump_bins(result):
    planned = result.provenance != Provenance.HOLD
    jumps = abs(np.diff(result.actions[:, 0]))[planned[1:] & planned[:-1]]
    return round(float(jumps.max()) * 128)


def test_a_forced_prefix_makes_the_seam_continuous():
    replaced, frozen = walk(HandOver.REPLACE), walk(HandOver.FROZEN_PREFIX)
    assert largest_jump_bins(replaced) > 10
    assert largest_jump_bins(frozen) == 1
    assert frozen.num_holds == replaced.num_holds == 0
    assert len({p.chunk_id for p in frozen.plans}) > 5
    assert all(plan.rung is Rung.EXACT for plan in frozen.plans)


def test_the_number_of_forced_steps_is_the_measured_delay():
    result = walk(HandOver.FROZEN_PREFIX, prefill_ms=2.0)
    delays = result.delay_steps.tolist()
    forced = [plan.rounds[1].num_forced // A for plan in result.plans[1:-1]]
    # The first plan is free, the second has only the deadline to go by: 16 periods, of which the chunk has four.
    assert forced[0] == 4
    # From the third on what was measured, a high quantile: of few plans the longest.
    assert forced[1:9] == [max(delays[1 : k + 2]) for k in range(8)]


def test_in_lock_step_nothing_is_forced():
    result = walk(HandOver.FROZEN_PREFIX, mode=Mode.LOCK_STEP)
    assert all(not any(r.num_forced for r in plan.rounds) for plan in result.plans)


def test_an_instruction_that_changes_in_mid_chunk_is_obeyed_at_once():
    """The actor asks with the new words: no history, no prefix, and the chunk takes over in the step it arrives."""
    robot = ToyRobot()
    clock = VirtualClock(500)
    planner = Planner(make_policy(clock))
    actor = Actor(robot, planner, ChunkBuffer(SPACE, A, FROZEN), 2, LATER, delay=DelayEstimator(warmup=0, initial=3))
    actor.reset(0, clock.now_ns())
    for step in range(4):
        now_ns = clock.now_ns() + step
        if step == 2:
            robot.instruction = "stay"
        if actor.look(now_ns):
            planner.tick(now_ns)
        command = actor.tick(now_ns)
    assert not any(r.num_forced for record in planner.records for r in record.rounds)
    assert (command.chunk_id, command.row) == (1, 1)


# --- known failures of others: huggingface/lerobot pull requests 4223 and 4454 ---


def test_warming_up_does_not_inflate_the_delay_for_ever():
    """Pull request 4223: the first inference took 21 ticks, all others 9; a running maximum never forgot it."""
    delay = DelayEstimator(window=8)
    delay.record(21)
    for _ in range(30):
        delay.record(9)
        assert delay.steps(30) == 9
    # And in a loop that waits for nobody: the first plan takes 25 steps, all others 3.
    clock = VirtualClock(500)

    class Cold(Walk):
        def prefill(self, inputs):
            self.clock.advance(0 if self.paths else 300 * MS)
            return super().prefill(inputs)

    policy = make_policy(clock, Cold(clock, 20 * MS, MS // 2))
    options = RuntimeOptions(
        mode=Mode.VIRTUAL, max_steps=80, is_first_plan_free=False, stop_on_success=False, chunks=FROZEN,
        budget_ns=400 * MS,
    )  # fmt: skip
    result = run_episode(ToyRobot(), policy, clock, options, 1)
    assert result.delay_steps[0] > 20
    later = [plan.rounds[1].num_forced // A for plan in result.plans[2:]]
    assert later
    assert set(later) == {3}


def test_one_slow_plan_is_forgotten():
    """Pull request 4223: neither is a slow plan in mid-run remembered for longer than the window."""
    delay = DelayEstimator(quantile=0.9, window=16, warmup=1)
    for steps in [3] * 20 + [14] + [3] * 15:
        delay.record(steps)
    assert delay.steps(30) == 3  # one of sixteen is beyond the quantile
    for _ in range(3):
        delay.record(14)
    assert delay.steps(30) == 14
    for _ in range(16):
        delay.record(3)
    assert delay.steps(30) == 3


POSITIONS = ActionSpace.from_limits(np.full(A, -1000.0), np.full(A, 1000.0), kind=DofKind.POSITION)


def ramp(start, rows=30, by=1.0):
    """Absolute positions: ``start + by``, ``start + 2 * by``, ..."""
    return np.repeat(start + by * (1 + np.arange(rows, dtype=np.float32)[:, None]), A, 1)


def test_the_first_chunk_starts_where_the_arm_stands_however_long_it_took():
    """Pull request 4223: 21 of 30 actions were skipped from standstill, a command 0.7 s deep into the trajectory."""
    b = ChunkBuffer(POSITIONS, A)
    for step in range(21):
        b.command(step)
    assert b.put(chunk_of(0, 30, actions=ramp(0)))
    assert b.command(21).action[0] == 1


@pytest.mark.parametrize("num_left", [0, 2, 5])
def test_a_starved_queue_never_splices_ahead_of_the_pose(num_left):
    """Pull request 4454: after a stall as many actions were discarded as the plan had taken, not as were consumed."""
    b = ChunkBuffer(POSITIONS, A, FROZEN)
    b.put(chunk_of(0, 10, actions=ramp(0, 10)))
    seen = 10 - num_left
    for step in range(seen):
        b.command(step)
    pose = float(b.command(seen).action[0]) if num_left else 10.0
    seen_pose = 10.0 - num_left
    for step in range(seen + bool(num_left), seen + 14):
        pose = float(b.command(step).action[0])
    assert pose == 10
    assert b.put(chunk_of(seen, 30, chunk_id=1, actions=ramp(seen_pose)))
    commands = [float(b.command(step).action[0]) for step in range(seen + 14, seen + 18)]
    assert commands == [11, 12, 13, 14]
    # The faulty way, for comparison: fourteen actions further than the arm is.
    faulty = ChunkBuffer(POSITIONS, A, ChunkOptions(is_shifted_by_holds=False))
    faulty.put(chunk_of(0, 10, actions=ramp(0, 10)))
    for step in range(seen + 14):
        faulty.command(step)
    faulty.put(chunk_of(seen, 30, chunk_id=1, actions=ramp(seen_pose)))
    assert faulty.command(seen + 14).action[0] == seen_pose + 15


def test_a_stall_does_not_make_later_prefixes_longer():
    """Pull request 4454: the delay is clamped to what was consumed, so a stall counts for what the arm did."""
    b = ChunkBuffer(POSITIONS, A, FROZEN)
    b.put(chunk_of(0, 6))
    for step in range(40):
        b.command(step)
    assert b.consumed_since(4) == 2


def test_a_prefix_is_never_padded():
    """Pull request 4454: a prefix padded with zeros decodes to the mean action for one step: 95, 103, 95.

    Here two actions are left and four are expected to go by: two are forced, and the seam goes on from them.
    """
    seen = []

    class Watched(Walk):
        def step(self, tokens, parents):
            if len(self.prefix) == 0:
                seen.append(tokens.tolist())
            return super().step(tokens, parents)

    clock = VirtualClock(500)
    policy = make_policy(clock, Watched(clock), FakeDrafter(), FakeController())
    old = TOKENIZER.encode(np.full((H, A), 0.6, np.float32))
    b = ChunkBuffer(SPACE, A, FROZEN)
    b.put(chunk_of(0, actions=TOKENIZER.decode(old)))
    for step in range(6):
        b.command(step)
    fixed = b.freeze(6, 4, "go")
    history = ChunkHistory(old, 6 * A, fixed * A, TOKENIZER.decode(old))
    chunk = policy.plan(observe(step=6), LATER, history)
    assert seen == [old[24:].tolist()]
    assert abs(np.diff(chunk.actions[:, 0]) * 128).max() == pytest.approx(1, abs=0.01)
    assert chunk.actions[0, 0] == pytest.approx(0.6, abs=1 / 128)
