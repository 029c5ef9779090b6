"""Timing logic, exactly: the clock is an argument and costs are whole nanoseconds."""

import numpy as np
import pytest
from contract.fakes import Scripted, Stopwatch, TableEngine, build, toy_parts

from vla_spec.controllers.adaptive import AdaptiveController
from vla_spec.controllers.adaptive import Options as AdaptiveOptions
from vla_spec.controllers.deadline import DeadlineController, Options
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.errors import BadConfig
from vla_spec.plugins import Parts
from vla_spec.types import Draft, Plan, Round, StopReason

# cost(gamma) = 50 gamma + 1000 + 100 gamma, straight lines between the measured lengths
COST_NS = {"prefill": 5000, "draft": {"1": 50, "8": 400}, "step": {"1": 1000, "2": 1100, "9": 1800}}


def cost(gamma):
    return 1000 + 150 * gamma


def took(ns, drafted=0, accepted=0):
    return Round(drafted, accepted, 0, 0, ns, 0, 0, ns)


def controller(cost_ns=COST_NS, max_step=None, **options):
    made = DeadlineController(Options(**{"margin_ns": 300, "warmup": 0, **options}), cost_ns, max_step)
    made.begin(1 << 60)
    made.record(took(5000))  # the prefill
    return made


# ---- deadline -------------------------------------------------------------------------------------------------


def test_stops_exactly_when_the_cheapest_round_no_longer_fits_before_the_margin():
    made = controller()
    assert made.plan(300 + cost(0), 30) == Plan(0, 0)
    assert made.plan(300 + cost(0) - 1, 30) is None


@pytest.mark.parametrize("gamma", range(1, 9))
def test_shortens_the_draft_to_what_fits(gamma):
    made = controller(prior=1.0)  # every token is accepted: the longest draft is the best
    assert made.plan(300 + cost(gamma), 30).gamma == gamma
    assert made.plan(300 + cost(gamma) - 1, 30).gamma == gamma - 1


@pytest.mark.parametrize("prior", [0.0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1.0])
def test_maximises_expected_tokens_per_ns(prior):
    rates = [sum(prior**d for d in range(gamma + 1)) / cost(gamma) for gamma in range(9)]
    plan = controller(prior=prior).plan(1 << 60, 30)
    assert plan == Plan(int(np.argmax(rates)), int(np.argmax(rates)))


def test_the_priors_above_span_short_and_long_drafts():
    assert [controller(prior=p).plan(1 << 60, 30).gamma for p in (0.05, 0.6, 1.0)] == [0, 2, 8]


def test_never_drafts_beyond_the_chunks_end():
    made = controller(prior=1.0)
    for left in range(1, 12):
        assert made.plan(1 << 60, left).gamma == min(left - 1, 8)


@pytest.mark.parametrize(
    ("made", "longest"),
    [
        (lambda: controller(prior=1.0, max_gamma=3), 3),
        (lambda: controller(prior=1.0, max_step=5), 4),
        (lambda: controller({**COST_NS, "draft": {1: 50, 6: 300}}, prior=1.0), 6),
        (lambda: controller({**COST_NS, "step": {1: 1000, 4: 1300}}, prior=1.0), 3),
        (lambda: controller({**COST_NS, "draft": {}}, prior=1.0), 8),
        (lambda: controller(prior=1.0, depth=2), 2),
    ],
)
def test_the_longest_draft_is_limited_by_options_engine_and_table(made, longest):
    assert made().plan(1 << 60, 100).gamma == longest


def test_a_tree_reaches_one_depth_per_top_k_nodes():
    made = controller(prior=1.0, top_k=4)
    assert made.plan(1 << 60, 30) == Plan(8, 2, 4)
    assert made.plan(1 << 60, 2) == Plan(4, 1, 4)
    assert made.plan(300 + cost(8) - 1, 30) == Plan(4, 1, 4)
    assert made.plan(300 + cost(4) - 1, 30) == Plan(0, 0, 4)


def test_learns_acceptance_per_depth():
    """Depth 1 is always accepted, depth 2 never: one token is worth drafting and no more."""
    made = controller(forget=1.0)
    for _ in range(200):
        plan = made.plan(1 << 60, 30)
        made.record(took(cost(plan.gamma), plan.gamma, min(plan.gamma, 1)))
    assert made.plan(1 << 60, 30) == Plan(1, 1)


def test_a_depth_that_is_no_longer_tried_is_tried_again():
    made = controller(prior=0.7)
    gammas = []

    def run(num_rounds, is_accepted):
        for _ in range(num_rounds):
            plan = made.plan(1 << 60, 30)
            gammas.append(plan.gamma)
            made.record(took(cost(plan.gamma), plan.gamma, plan.gamma * is_accepted))

    run(2000, False)
    assert gammas[0] > 0
    assert 0 in gammas
    back = gammas.index(0)
    assert max(gammas[back:]) > 0, "once at 0 it never drafts again"
    assert 0.9 < np.mean(np.array(gammas[100:]) == 0) < 1.0
    run(200, True)  # the draft has become good: that is noticed within some rounds
    assert gammas[-1] == 8


def test_depths_behind_the_first_rejection_and_cut_off_nodes_say_nothing():
    """Only judged depths count: nothing is known about depth 3 when depth 2 was rejected."""
    made = controller(prior=0.9, prior_weight=1.0, forget=1.0, forget_untried=1.0)
    for _ in range(50):
        assert made.plan(1 << 60, 4).depth <= 3
        made.record(took(cost(3), 3, 0))
    # Depth 1 is hopeless. Were depths 2 and 3 counted as rejected too, they would stay hopeless below.
    for _ in range(2000):
        made.record(took(cost(1), 1, 1))
    assert made.plan(1 << 60, 4).depth == 3


def test_recent_rounds_weigh_more():
    made = controller()
    for is_accepted, expected in ((True, 8), (False, 0)):
        for _ in range(1000 if is_accepted else 200):
            gamma = made.plan(1 << 60, 30).gamma
            made.record(took(cost(gamma), gamma, gamma * is_accepted))
        assert made.plan(1 << 60, 30).gamma == expected


def test_corrects_itself_by_measured_over_predicted():
    made = controller(quantile=1.0)
    made.record(took(2 * cost(0)))
    assert made.correction == 2.0
    assert made.plan(300 + 2 * cost(0), 30) == Plan(0, 0)
    assert made.plan(300 + 2 * cost(0) - 1, 30) is None


def test_the_ratio_belongs_to_the_length_that_was_drafted():
    made = controller(quantile=1.0)
    plan = made.plan(1 << 60, 30)
    made.record(took(3 * cost(plan.gamma), plan.gamma, 0))
    assert made.correction == pytest.approx(3.0)


def test_prefill_and_warm_up_do_not_count():
    made = controller(warmup=2, quantile=1.0)
    for _ in range(2):
        made.record(took(50 * cost(0)))
        assert made.correction == 1.0
    made.begin(1 << 60)
    made.record(took(10**9))  # a prefill
    assert made.correction == 1.0
    made.record(took(cost(0) // 2))
    assert made.correction == 0.5


def test_the_correction_is_a_quantile_of_a_window():
    made = controller(window=10, quantile=0.9)
    for ratio in range(1, 11):
        made.record(took(ratio * cost(0)))
    assert made.correction == 9.0  # the 9th of 10: one outlier in ten is ignored
    for _ in range(9):
        made.record(took(cost(0)))
    assert made.correction == 1.0
    made.record(took(cost(0)))
    assert made.correction == 1.0


def test_a_stall_does_not_end_drafting_for_good():
    made = controller(quantile=1.0, window=8)
    for _ in range(8):
        made.record(took(1000 * cost(0)))
    remaining = 300 + 10 * cost(0)
    num_chunks = 0
    while made.plan(remaining, 30) is None:
        made.begin(1 << 60)
        made.record(took(5000))
        num_chunks += 1
        assert num_chunks <= 32
    assert num_chunks > 1


def test_a_chunk_with_rounds_forgets_nothing():
    made = controller(quantile=1.0)
    made.record(took(4 * cost(0)))
    for _ in range(5):
        made.begin(1 << 60)
        made.record(took(5000))
        made.record(took(cost(0)))
    assert made.correction == 4.0


@pytest.mark.parametrize("table", [None, {}, {"step": {}}, {"step": {1: 0}}, {"step": {1: float("nan")}}])
def test_no_cost_table_no_controller(table):
    with pytest.raises(BadConfig, match="cost table"):
        controller(table)


def test_build_reads_table_and_engine_from_the_parts():
    parts = toy_parts(target=TableEngine(4, 0, max_step=3))
    made = build("controller", "deadline", parts, prior=1.0)
    made.begin(1 << 60)
    made.record(took(5000))
    assert made.plan(1 << 60, 30).gamma == 2
    with pytest.raises(BadConfig, match="calibrate"):
        build("controller", "deadline", Parts(parts.domain, parts.tokenizer))


def test_in_the_loop_it_is_never_late_and_leaves_no_round_unused():
    """Costs that are exactly as in the table, on a clock that only the engine and the drafter move."""
    late = {"deadline": 0, "fixed": 0}
    for name in late:
        for budget_ns in range(6000, 20000, 333):
            clock = Stopwatch()
            table = TableEngine(4, seed=1)

            class Timed(TableEngine):
                def prefill(self, inputs, clock=clock):
                    clock.advance(5000)
                    return super().prefill(inputs)

                def step(self, tokens, parents, clock=clock):
                    clock.advance(900 + 100 * len(tokens))
                    return super().step(tokens, parents)

            def make(prefix, plan, history, clock=clock, table=table):
                clock.advance(50 * plan.gamma)
                tokens = list(prefix)
                for _ in range(plan.gamma):
                    tokens.append(int(table.row(tuple(tokens)).argmax()))
                return Draft.chain(np.array(tokens[len(prefix) :], np.int32))

            made = (
                DeadlineController(Options(margin_ns=300, warmup=0), COST_NS)
                if name == "deadline"
                else build("controller", "fixed", toy_parts(), gamma=4)
            )
            decoder = SpeculativeDecoder(
                Timed(4, seed=1), Scripted(make), build("rule", "greedy", toy_parts()), made, 40, clock,
                np.random.default_rng(0),
            )  # fmt: skip
            decoded = decoder.decode({}, budget_ns)
            late[name] += clock() > budget_ns
            if name == "deadline":
                assert clock() <= budget_ns - 300 or len(decoded.rounds) == 1
                if decoded.stop == StopReason.DEADLINE:
                    assert budget_ns - 300 - clock() < cost(0)
    assert late["deadline"] == 0
    assert late["fixed"] > 10


# ---- fixed ----------------------------------------------------------------------------------------------------


def test_fixed_plans_the_same_until_the_deadline():
    made = build("controller", "fixed", toy_parts(), gamma=5, depth=3, top_k=2, tolerance=0.5)
    assert made.plan(1, 1) == made.plan(10**9, 30) == Plan(5, 3, 2, 0.5)
    assert made.plan(0, 30) is None
    assert build("controller", "fixed", toy_parts(), gamma=5).plan(1, 1) == Plan(5, 5)


# ---- adaptive -------------------------------------------------------------------------------------------------


def adaptive(**options):
    return AdaptiveController(AdaptiveOptions(**options))


def play(made, rate, num_rounds, tokens_left=100):
    """Rounds in which this share of the draft is accepted; returns every gamma."""
    gammas = []
    for _ in range(num_rounds):
        plan = made.plan(1, tokens_left)
        drafted = min(plan.gamma, tokens_left - 1)
        made.record(took(1, drafted, round(rate * drafted)))
        gammas.append(plan.gamma)
    return gammas


def test_adaptive_lengthens_while_all_is_accepted_and_shortens_while_nothing_is():
    made = adaptive(gamma=4, max_gamma=9, min_gamma=2)
    gammas = play(made, 1.0, 200)
    assert gammas == sorted(gammas)
    assert gammas[0] == 4
    assert gammas[-1] == 9
    gammas = play(made, 0.0, 200)
    assert gammas == sorted(gammas, reverse=True)
    assert gammas[-1] == 2


def test_adaptive_stays_inside_the_hysteresis_band():
    made = adaptive(gamma=10, max_gamma=20, raise_at=0.8, lower_at=0.5)
    assert set(play(made, 0.7, 200)) == {10}


def test_adaptive_changes_by_one_and_not_more_often_than_its_patience():
    gammas = play(adaptive(gamma=1, max_gamma=16, patience=5, weight=1.0), 1.0, 60)
    changes = np.flatnonzero(np.diff(gammas))
    assert np.diff(gammas).max() == 1
    assert np.diff(changes).min() == 5


def test_adaptive_does_not_shorten_for_drafts_that_the_chunks_end_cut_short():
    made = adaptive(gamma=10, max_gamma=20)
    assert set(play(made, 1.0, 100, tokens_left=4)) == {10}
    assert set(play(made, 0.0, 100, tokens_left=4)) != {10}


def test_adaptive_ignores_rounds_without_a_draft_and_stops_at_the_deadline():
    made = adaptive(gamma=4)
    for _ in range(100):
        made.record(took(1))
    assert made.plan(1, 30) == Plan(4, 4)
    assert made.plan(0, 30) is None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fixed", {"gamma": -1}),
        ("fixed", {"tolerance": 1.5}),
        ("adaptive", {"gamma": 20}),
        ("adaptive", {"min_gamma": 0}),
        ("adaptive", {"raise_at": 0.4}),
        ("adaptive", {"weight": 0.0}),
        ("adaptive", {"patience": 0}),
        ("deadline", {"margin_ns": -1}),
        ("deadline", {"quantile": 1.1}),
        ("deadline", {"forget": 0.0}),
        ("deadline", {"window": 0}),
        ("deadline", {"top_k": 0}),
    ],
)
def test_bad_options_say_what_is_valid(name, options):
    with pytest.raises(BadConfig, match=r"need|must be"):
        build("controller", name, toy_parts(), **options)
