"""The loop: when it stops, what it keeps, what it reports."""

import numpy as np
import pytest
from contract.fakes import (
    Scripted,
    Stopwatch,
    TableEngine,
    build,
    toy_engine,
    toy_inputs,
    toy_parts,
    tree_drafter,
)

from vla_spec.decoder import SpeculativeDecoder
from vla_spec.interfaces import ChunkHistory
from vla_spec.types import EMPTY_DRAFT, Draft, Plan, Provenance, Round, Scores, StopReason, Verdict

NO_DEADLINE = 1 << 60
PREFILL_NS, STEP_NS = 5000, 1000


class Faulty(TableEngine):
    """Scores turn bad at the n-th call; every call moves the clock."""

    def __init__(self, bad_call=None, bad_value=np.nan, clock=None, vocab_size=6, max_step=16):
        super().__init__(vocab_size, seed=3, max_step=max_step)
        self.clock = Stopwatch() if clock is None else clock
        self.bad_call, self.bad_value, self.num_calls, self.sizes = bad_call, bad_value, 0, []

    def _maybe_bad(self, scores):
        self.num_calls += 1
        if self.num_calls == self.bad_call:
            logits = scores.logits.copy()
            logits[-1, 2] = self.bad_value
            return Scores(logits)
        return scores

    def prefill(self, inputs):
        self.clock.advance(PREFILL_NS)
        return self._maybe_bad(super().prefill(inputs))

    def step(self, tokens, parents):
        self.clock.advance(STEP_NS)
        self.sizes.append(len(tokens))
        return self._maybe_bad(super().step(tokens, parents))


def perfect(table):
    def make(prefix, plan, history):
        tokens = prefix.tolist()
        for _ in range(min(plan.gamma, plan.depth)):
            tokens.append(int(table.row(tuple(tokens)).argmax()))
        return Draft.chain(np.array(tokens[len(prefix) :], np.int32))

    return Scripted(make)


def decoder(engine, drafter=None, num_tokens=12, controller=None, clock=None, **plan):
    parts = toy_parts()
    controller = build("controller", "fixed", parts, **{"gamma": 3, **plan}) if controller is None else controller
    drafter = perfect(TableEngine(engine.vocab_size, seed=3)) if drafter is None else drafter
    clock = getattr(engine, "clock", lambda: 0) if clock is None else clock
    rule = build("rule", "greedy", parts)
    return SpeculativeDecoder(engine, drafter, rule, controller, num_tokens, clock, np.random.default_rng(0))


@pytest.mark.parametrize("bad_value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("bad_call", [1, 2, 3])
def test_scores_that_are_not_finite_stop_decoding_and_keep_what_was_verified(bad_call, bad_value):
    whole = decoder(Faulty()).decode({}, NO_DEADLINE)
    decoded = decoder(Faulty(bad_call, bad_value)).decode({}, NO_DEADLINE)
    assert decoded.stop == StopReason.BAD_SCORES
    assert len(decoded.rounds) == bad_call - 1
    assert len(decoded.tokens) == [0, 1, 5][bad_call - 1]
    np.testing.assert_array_equal(decoded.tokens, whole.tokens[: len(decoded.tokens)])
    assert len(decoded.provenance) == len(decoded.deviation) == len(decoded.tokens)


def test_it_recovers_at_the_next_chunk():
    made = decoder(Faulty(bad_call=2))
    assert made.decode({}, NO_DEADLINE).stop == StopReason.BAD_SCORES
    again = made.decode({}, NO_DEADLINE)
    assert again.stop == StopReason.COMPLETE
    np.testing.assert_array_equal(again.tokens, decoder(Faulty()).decode({}, NO_DEADLINE).tokens)


@pytest.mark.parametrize("num_rounds", [0, 1, 2])
def test_deadline_stops_between_rounds_and_keeps_the_verified_prefix(num_rounds):
    engine = Faulty()
    decoded = decoder(engine).decode({}, PREFILL_NS + num_rounds * STEP_NS)
    assert decoded.stop == StopReason.DEADLINE
    assert len(decoded.rounds) == 1 + num_rounds
    assert len(decoded.tokens) == 1 + 4 * num_rounds
    whole = decoder(Faulty()).decode({}, NO_DEADLINE)
    np.testing.assert_array_equal(decoded.tokens, whole.tokens[: len(decoded.tokens)])


def test_a_deadline_that_has_passed_costs_no_forward():
    engine = Faulty()
    decoded = decoder(engine).decode({}, -1)
    assert decoded.stop == StopReason.NO_TIME
    assert len(decoded.tokens) == 0
    assert decoded.rounds == ()


def test_a_perfect_drafter_needs_one_round_per_gamma_plus_1_tokens():
    decoded = decoder(Faulty(), num_tokens=13).decode({}, NO_DEADLINE)
    assert [r.num_accepted for r in decoded.rounds] == [0, 3, 3, 3]
    assert len(decoded.tokens) == 13


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 6])
def test_nothing_is_drafted_that_would_be_thrown_away(num_tokens):
    engine = Faulty()
    decoded = decoder(engine, num_tokens=num_tokens, gamma=15).decode({}, NO_DEADLINE)
    assert len(decoded.tokens) == num_tokens
    assert decoded.stop == StopReason.COMPLETE
    assert engine.sizes == ([num_tokens - 1] if num_tokens > 1 else [])


def test_no_step_is_larger_than_the_engine_takes():
    engine = Faulty(max_step=4)
    decoder(engine, num_tokens=30, gamma=15).decode({}, NO_DEADLINE)
    assert max(engine.sizes) == 4


def test_the_rounds_say_where_the_time_went():
    clock = Stopwatch()
    table = TableEngine(6, seed=3)
    inner = perfect(table)

    def make(prefix, plan, history):
        clock.advance(70)
        return inner.make(prefix, plan, history)

    recorded = []

    class Listening:
        def begin(self, remaining_ns, history=None):
            clock.advance(0)
            return True

        def plan(self, remaining_ns, tokens_left):
            clock.advance(5)
            return Plan(3, 3)

        def record(self, measured):
            recorded.append(measured)

    decoded = decoder(Faulty(clock=clock), Scripted(make), num_tokens=5, controller=Listening()).decode({}, NO_DEADLINE)
    assert decoded.rounds == (
        Round(0, 0, 0, 0, PREFILL_NS, 0, 0, PREFILL_NS),
        Round(3, 3, 0, 75, STEP_NS, 0, 0, 1075, PREFILL_NS),
    )
    assert tuple(recorded) == decoded.rounds


def test_provenance_and_deviation_follow_the_verdict():
    class Alternating:
        """Accepts the whole chain and calls every second accepted token relaxed."""

        exact = False

        def judge(self, draft, scores, committed, rng, tolerance=1.0):
            relaxed = np.arange(len(draft.tokens)) % 2 == 1
            path = np.arange(len(draft.tokens), dtype=np.int32)
            return Verdict(path, 5, relaxed, np.where(relaxed, 0.25, 0.0).astype(np.float32))

    made = decoder(Faulty(), num_tokens=6)
    made.rule = Alternating()
    decoded = made.decode({}, NO_DEADLINE)
    relaxed, exact = Provenance.RELAXED, Provenance.EXACT
    #                                     prefill, then 3 drafted and the one that follows, then a plain round
    assert decoded.provenance.tolist() == [exact, exact, relaxed, exact, exact, exact]
    assert decoded.deviation.tolist() == [0.0, 0.0, 0.25, 0.0, 0.0, 0.0]
    assert [r.num_relaxed for r in decoded.rounds] == [0, 1, 0]


def test_the_rule_sees_what_was_committed_and_the_plans_tolerance():
    seen = []
    made = decoder(Faulty(), num_tokens=6, tolerance=0.5)
    inner = made.rule

    class Watching:
        exact = True

        def judge(self, draft, scores, committed, rng, tolerance=1.0):
            seen.append((committed.tokens.tolist(), len(committed.deviation), tolerance, len(scores.logits)))
            return inner.judge(draft, scores, committed, rng)

    made.rule = Watching()
    tokens = made.decode({}, NO_DEADLINE).tokens.tolist()
    assert seen == [([], 0, 1.0, 1), (tokens[:1], 1, 0.5, 4), (tokens[:5], 5, 0.5, 1)]


def test_results_of_one_chunk_survive_the_next():
    parts = toy_parts()
    rule, controller = build("rule", "greedy", parts), build("controller", "fixed", parts)
    made = SpeculativeDecoder(
        toy_engine(parts), build("drafter", "none", parts), rule, controller, 32, lambda: 0, np.random.default_rng(0)
    )
    first = made.decode(toy_inputs(0), NO_DEADLINE)
    copy = first.tokens.copy()
    second = made.decode(toy_inputs(50), NO_DEADLINE, ChunkHistory(first.tokens, 4))
    assert (second.tokens != copy).any()
    np.testing.assert_array_equal(first.tokens, copy)


def test_a_drafter_that_wants_scores_sees_every_round():
    table = TableEngine(6, seed=3)

    class Curious:
        def __init__(self):
            self.seen, self.inner = [], perfect(table)

        def begin(self, inputs, history):
            pass

        def propose(self, prefix, plan, features):
            return self.inner.propose(prefix, plan, features)

        def observe(self, draft, scores):
            self.seen.append((draft.tokens.tolist(), scores.logits.copy()))

    drafter = Curious()
    tokens = decoder(Faulty(), drafter, num_tokens=6).decode({}, NO_DEADLINE).tokens.tolist()
    assert [draft for draft, _ in drafter.seen] == [[], tokens[1:4], []]
    for (_, logits), first in zip(drafter.seen, (0, 1, 5), strict=True):
        for row, scores in enumerate(logits):
            np.testing.assert_array_equal(scores, table.row(tuple(tokens[: first + row])))


def test_features_belong_to_the_tokens_before_the_last():
    parts = toy_parts()
    engine = toy_engine(parts)
    inner, seen = tree_drafter(np.random.default_rng(0), 256), []

    class Looking:
        begin = staticmethod(inner.begin)

        @staticmethod
        def propose(prefix, plan, features):
            seen.append((len(prefix), len(features)))
            return inner.propose(prefix, plan, features)

    rule, controller = build("rule", "greedy", parts), build("controller", "fixed", parts)
    SpeculativeDecoder(engine, Looking(), rule, controller, 32, lambda: 0, np.random.default_rng(0)).decode(
        toy_inputs(), NO_DEADLINE
    )
    assert seen
    assert all(rows == 1 + m - 1 for m, rows in seen)  # one prompt row, and every token but the last


def test_gamma_0_and_an_empty_draft_are_plain_decoding():
    expected = decoder(Faulty(), gamma=0).decode({}, NO_DEADLINE)
    assert len(expected.rounds) == 12
    silent = Scripted(lambda prefix, plan, history: EMPTY_DRAFT)
    found = decoder(Faulty(), silent).decode({}, NO_DEADLINE)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert len(found.rounds) == 12
