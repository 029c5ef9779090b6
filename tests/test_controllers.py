"""Timing logic, exactly: the clock is an argument and costs are whole nanoseconds."""

import math
import tracemalloc

import numpy as np
import pytest
from contract.fakes import Scripted, Stopwatch, TableEngine, build, toy_parts

from vla_spec.controllers._overrun_law import OverrunLaw, exceedance
from vla_spec.controllers._survival import SurvivalModel
from vla_spec.controllers.adaptive import AdaptiveController
from vla_spec.controllers.adaptive import Options as AdaptiveOptions
from vla_spec.controllers.deadline import DeadlineController, Options
from vla_spec.costs import Costs
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.errors import BadConfig
from vla_spec.plugins import Parts
from vla_spec.types import Draft, Plan, Round, StopReason

MARGIN, PREFILL = 300, 5000
#: cost(gamma) = 50 gamma + 1000 + 100 gamma, straight lines between the stored sizes.
COSTS = Costs.constant(PREFILL, {1: 1000, 2: 1100, 9: 1800}, {1: 50, 8: 400})
AGES = 1 << 60


def cost(gamma):
    return 1000 + 150 * gamma


def took(ns, drafted=0, accepted=0):
    return Round(drafted, accepted, 0, 50 * drafted, ns - 50 * drafted, 0, 0, ns)


def controller(costs=COSTS, num_tokens=32, max_step=None, has_tree=True, **options):
    """A table without spread is trusted, and nothing is warm-up, unless a test says so."""
    made = DeadlineController(
        Options(**{"margin_ns": MARGIN, "warmup": 0, "spread": 0.0, **options}), costs, num_tokens, max_step, has_tree
    )
    made.begin(AGES)
    made.record(took(PREFILL))
    return made


def a_round(made, left, accept, remaining_ns=AGES, slow=1.0):
    """Plan and play one round; ``accept(depth, position)`` says which drafted tokens are. Returns the plan."""
    plan = made.plan(remaining_ns, left)
    if plan is not None:
        m, accepted = 32 - left, 0
        while accepted < min(plan.depth, left - 1) and accept(accepted + 1, m + accepted):
            accepted += 1
        made.record(took(round(slow * cost(plan.gamma)), plan.gamma, accepted))
    return plan


def chunk(made, budget_ns=AGES, accept=lambda depth, position: True, prefill=PREFILL, slow=lambda: 1.0, num_tokens=32):
    """One whole chunk in virtual time. Returns (is_late, tokens verified in time, was a prefill started)."""
    if not made.begin(budget_ns):
        return False, 0, False
    now = round(prefill * slow())
    made.record(took(now))
    if now > budget_ns:
        return True, 0, True
    m = 1
    while m < num_tokens:
        plan = made.plan(budget_ns - now, num_tokens - m)
        if plan is None:
            break
        drafted, accepted = min(plan.gamma, num_tokens - m - 1), 0
        while accepted < drafted and accept(accepted + 1, m + accepted):
            accepted += 1
        ns = round(slow() * cost(drafted))
        now += ns
        made.record(took(ns, drafted, accepted))
        if now > budget_ns:
            return True, m, True
        m += accepted + 1
    return False, m, True


# ---- deadline: what fits --------------------------------------------------------------------------------------


def test_stops_exactly_when_the_cheapest_round_no_longer_fits_before_the_margin():
    made = controller()
    assert made.plan(MARGIN + cost(0), 30) == Plan(0, 0)
    assert made.plan(MARGIN + cost(0) - 1, 30) is None


@pytest.mark.parametrize("gamma", range(1, 9))
def test_shortens_the_draft_to_what_fits(gamma):
    made = controller(prior=1.0)  # every token is accepted
    assert made.plan(MARGIN + cost(gamma), 30).gamma == gamma
    assert made.plan(MARGIN + cost(gamma) - 1, 30).gamma == gamma - 1


def test_a_prefill_that_cannot_fit_is_not_started():
    made = controller(patience=1000)
    assert made.begin(MARGIN + PREFILL)
    assert not made.begin(MARGIN + PREFILL - 60)  # predictions are held against time to one part in a hundred
    assert not made.begin(0)
    assert not made.begin(-AGES)


def test_never_drafts_beyond_the_chunks_end():
    made = controller(prior=1.0)
    for left in range(1, 12):
        assert made.plan(AGES, left).depth <= left - 1
    assert made.plan(MARGIN + cost(3), 4).gamma == 3


@pytest.mark.parametrize(
    ("made", "longest"),
    [
        (lambda: controller(prior=1.0, max_gamma=3), 3),
        (lambda: controller(prior=1.0, max_step=5), 4),
        (lambda: controller(Costs.constant(5000, {1: 1000, 9: 1800}, {1: 50, 6: 300}), prior=1.0), 6),
        (lambda: controller(Costs.constant(5000, {1: 1000, 4: 1300}, {1: 50, 8: 400}), prior=1.0), 3),
        (lambda: controller(Costs.constant(5000, {1: 1000, 9: 1800}), prior=1.0), 8),
        (lambda: controller(prior=1.0, depth=2), 2),
        (lambda: controller(num_tokens=6, prior=1.0), 4),
    ],
)
def test_the_longest_draft_is_limited_by_options_engine_table_and_chunk(made, longest):
    assert max(made().plan(AGES, left).gamma for left in range(1, 33)) == longest


def test_a_plan_that_nobody_carries_out_changes_nothing():
    """A chunk's fixed beginning is fed between a plan and the next one."""
    made, other = controller(), controller()
    made.plan(10_000, 32)
    for left in range(31, 0, -1):
        assert made.plan(10_000, left) == other.plan(10_000, left)


# ---- deadline: what is best -----------------------------------------------------------------------------------


def expected_tokens(choose, accept, m, left_ns, num_tokens):
    """Of a policy, by enumeration of what may be accepted. It must not start what does not fit."""
    if m >= num_tokens or (gamma := choose(m, left_ns)) is None:
        return 0.0
    assert cost(gamma) <= left_ns
    total = 0.0
    for accepted in range(gamma + 1):
        chance = accept**accepted * (1.0 if accepted == gamma else 1.0 - accept)
        after = expected_tokens(choose, accept, m + accepted + 1, left_ns - cost(gamma), num_tokens)
        total += chance * (accepted + 1 + after)
    return total


def most_expected_tokens(accept, m, left_ns, num_tokens, known):
    if m >= num_tokens:
        return 0.0
    if (m, left_ns) not in known:
        known[m, left_ns] = max(
            (
                sum(
                    accept**a
                    * (1.0 if a == gamma else 1.0 - accept)
                    * (a + 1 + most_expected_tokens(accept, m + a + 1, left_ns - cost(gamma), num_tokens, known))
                    for a in range(gamma + 1)
                )
                for gamma in range(min(8, num_tokens - m - 1) + 1)
                if cost(gamma) <= left_ns
            ),
            default=0.0,
        )
    return known[m, left_ns]


@pytest.mark.parametrize("accept", [0.3, 0.6, 0.9])
def test_expects_nearly_as_many_tokens_by_the_deadline_as_the_best_policy(accept):
    num_tokens = 12
    made = controller(num_tokens=num_tokens, prior=accept)

    def choose(m, left_ns):
        plan = made.plan(left_ns + MARGIN, num_tokens - m)
        return None if plan is None else plan.gamma

    ours = best = 0.0
    for left_ns in range(1000, 9000, 130):
        ours += expected_tokens(choose, accept, 1, left_ns, num_tokens)
        best += most_expected_tokens(accept, 1, left_ns, num_tokens, {})
    assert 0.98 * best < ours <= best + 1e-6


@pytest.mark.parametrize("accept", [0.05, 0.3, 0.6, 0.9])
def test_with_plenty_of_time_it_finishes_nearly_as_early_as_the_best_policy(accept):
    num_tokens = 16
    made = controller(num_tokens=num_tokens, prior=accept)
    ours, best = np.zeros(num_tokens + 10), np.zeros(num_tokens + 10)  # [m] expected time to the chunk's end

    def time_ns(gamma, m, after):
        chances = [accept**a * (1.0 if a == gamma else 1.0 - accept) for a in range(gamma + 1)]
        return cost(gamma) + sum(chance * after[m + a + 1] for a, chance in enumerate(chances))

    for m in range(num_tokens - 1, 0, -1):
        best[m] = min(time_ns(gamma, m, best) for gamma in range(min(8, num_tokens - m - 1) + 1))
        ours[m] = time_ns(made.plan(AGES, num_tokens - m).gamma, m, ours)
    assert ours[1] < 1.02 * best[1]


def test_a_tree_is_taken_where_it_is_worth_its_nodes():
    """Each depth of a tree costs two nodes: taken once chains are known to fail, and trees are not."""
    made = controller(top_k=2)
    shapes = []
    for _ in range(100):
        made.begin(AGES)
        made.record(took(PREFILL))
        for left in (30, 20, 10, 2):
            plan = made.plan(AGES, left)
            shapes.append(plan.top_k)
            made.record(took(cost(plan.gamma), plan.gamma, plan.depth if plan.top_k > 1 else 0))
    assert shapes[0] == 1
    assert set(shapes[-40:]) == {2}
    assert made.plan(AGES, 2) == made.plan(MARGIN + cost(2), 2) == Plan(2, 1, 2)
    assert made.plan(MARGIN + cost(2) - 1, 2).top_k == 1


def test_an_engine_without_branches_gets_chains():
    made = controller(top_k=4, has_tree=False, prior=1.0)
    assert {made.plan(AGES, left).top_k for left in range(1, 32)} == {1}


def test_the_tolerance_is_widened_only_for_want_of_time():
    made = controller(least_tolerance=0.2, tolerance=0.8, prior=0.9)
    for is_tight in [False, True] * 300:  # tolerant drafts are always accepted, strict ones half as far
        for left in (31, 20, 10):
            a_round(made, left, lambda depth, position, t=is_tight: t or depth < 2, 20_000 if is_tight else AGES)
        made.begin(AGES)
        made.record(took(PREFILL))
    assert made.plan(AGES, 30).tolerance == 0.2
    assert made.plan(MARGIN + 6000, 30).tolerance == 0.8
    assert controller(tolerance=0.5).plan(MARGIN + 6000, 30).tolerance == 0.5


# ---- deadline: what it learns ---------------------------------------------------------------------------------


def test_learns_acceptance_per_depth():
    """Depth 1 is always accepted, depth 2 never: one token is worth drafting and no more."""
    made = controller(num_tokens=32)
    for i in range(900):
        if i % 3 == 0:
            made.begin(AGES)
            made.record(took(PREFILL))
        a_round(made, (31, 21, 11)[i % 3], lambda depth, position: depth < 2)
    assert made.plan(AGES, 31).gamma == made.plan(AGES, 21).gamma == 1


def test_learns_acceptance_per_position():
    """Every fourth position is hard and all others are easy: drafts end before the hard ones, which then come free."""
    made = controller(prior=0.9)
    chunks = []
    for _ in range(300):
        made.begin(AGES)
        made.record(took(PREFILL))
        m, gammas = 1, []
        while m < 32:
            gammas.append(a_round(made, 32 - m, lambda depth, position: position % 4 != 0).gamma)
            m += min(gammas[-1], -m % 4) + 1
        chunks.append(gammas)
    assert max(chunks[0]) > 4
    taken = [sum(map(cost, gammas)) for gammas in chunks]
    best = 7 * cost(3) + cost(2)
    assert taken[0] > 1.1 * best
    assert np.mean(taken[-100:]) < 1.03 * best


def test_what_is_no_longer_tried_is_tried_again():
    made = controller(prior=0.7)
    gammas = []

    def play(num_chunks, is_accepted):
        for _ in range(num_chunks):
            made.begin(AGES)
            made.record(took(PREFILL))
            left = 31
            while left > 0:
                plan = a_round(made, left, lambda depth, position: is_accepted)
                gammas.append(plan.gamma)
                left -= 1 + is_accepted * plan.depth

    play(500, False)
    assert gammas[0] > 0
    settled = np.array(gammas[1000:])
    assert 0.85 < np.mean(settled == 0) < 1.0, "hopeless drafts are rare, and are not given up for ever"
    play(200, True)
    assert np.mean(gammas[-20:]) > 4


def test_a_drafter_that_offers_less_fails_where_it_ends():
    made = controller(prior=0.9)
    for _ in range(300):
        made.begin(AGES)
        made.record(took(PREFILL))
        for left in (31, 25, 19, 13):
            plan = made.plan(AGES, left)
            drafted = min(plan.gamma, 2)
            made.record(took(cost(drafted), drafted, drafted))
    assert [made.plan(AGES, left).gamma for left in (31, 25, 19, 13)] == [2] * 4


def test_survival_falls_with_depth_and_knows_its_position():
    model = SurvivalModel(8, [1.0], 4, 0.7, 4.0, 1.0)
    assert model.survival(1, 0, 3) == pytest.approx([1.0, 0.7, 0.49, 0.343])
    for _ in range(500):
        model.record(1, 0, 4, 2)  # positions 1 and 2 hold, position 3 fails
        model.record(5, 0, 2, 2)
        model.refresh()
    alive = model.survival(1, 0, 4)
    assert (np.diff(alive) <= 0).all()
    assert alive[2] > 0.95
    assert alive[3] < 0.15
    assert model.survival(5, 0, 2)[2] > 0.95


# ---- deadline: how fast the device is --------------------------------------------------------------------------


def test_a_slower_device_is_noticed_within_three_rounds():
    made = controller()
    for _ in range(20):
        a_round(made, 31, lambda depth, position: True)
    assert made.correction == pytest.approx(1.0)
    seen = []
    for _ in range(5):
        a_round(made, 31, lambda depth, position: True, slow=2.0)
        seen.append(made.correction)
    assert seen[2] > 1.5
    assert 1.8 < seen[4] <= 2.0
    for _ in range(5):
        a_round(made, 31, lambda depth, position: True)
    assert made.correction < 1.1


def test_one_stall_does_not_change_the_devices_speed_much():
    made = controller()
    a_round(made, 31, lambda depth, position: True, slow=1000.0)
    assert 1.0 < made.correction < 1.12


def test_warm_up_does_not_count():
    made = controller(warmup=3)
    made.begin(AGES)
    made.record(took(80 * PREFILL))
    for _ in range(3):
        a_round(made, 31, lambda depth, position: True, slow=50.0)
    assert made.correction == 1.0
    assert made.overrun_probability(0, MARGIN + cost(0)) == 0.0
    assert made.plan(MARGIN + cost(0), 30) is not None
    a_round(made, 31, lambda depth, position: True, slow=2.0)
    assert made.correction > 1.0


def test_a_stall_ends_neither_drafting_nor_planning_for_good():
    made = controller()
    budget = MARGIN + PREFILL + 3 * cost(4)
    for _ in range(30):
        chunk(made, budget)
    for _ in range(8):
        a_round(made, 31, lambda depth, position: True, slow=1000.0)
    tokens = [chunk(made, budget)[1] for _ in range(60)]
    assert tokens[0] < max(tokens)
    assert max(tokens[:40]) > 1, "no round for forty chunks after the stall"
    assert np.mean(tokens[-10:]) > 10


def test_refused_prefills_are_tried_again_and_less_and_less_often():
    made = controller(max_late=0.01)
    budget = MARGIN + 2 * PREFILL
    for _ in range(20):
        chunk(made, AGES, slow=lambda: 8.0)
    assert made.correction > 4
    started = [chunk(made, budget, slow=lambda: 8.0)[2] for _ in range(600)]
    assert started[0] is False
    assert 4 <= sum(started) <= 14  # after 4, 8, 16, 32, 64 and then every 100
    assert max(np.diff(np.flatnonzero(started))) == 100
    first = next(i for i in range(101) if chunk(made, budget)[2])  # the device is well again
    assert all(chunk(made, budget)[2] for _ in range(100)), first


def test_a_prefill_that_the_table_calls_hopeless_is_never_tried():
    made = controller(patience=1)
    assert not any(made.begin(PREFILL // 3) for _ in range(200))


def test_drafts_that_cost_more_than_the_table_says_are_noticed():
    """By the table a drafted token takes 50 ns; really it takes 2,000, more than a plain round."""
    made = controller(prior=1.0)
    gammas = []
    for i in range(300):
        if i % 3 == 0:
            made.begin(AGES)
            made.record(took(PREFILL))
        gamma = made.plan(AGES, 31).gamma
        step_ns = 1000 + 100 * gamma
        made.record(Round(gamma, gamma, 0, 2000 * gamma, step_ns, 0, 0, 2000 * gamma + step_ns))
        gammas.append(gamma)
    assert gammas[0] > 4
    assert set(gammas[-20:]) == {0}


# ---- deadline: how sure it is ----------------------------------------------------------------------------------


def test_a_wider_law_stops_earlier():
    spread = Costs(
        {0.5: 5000, 0.9: 6000, 0.99: 7000, 0.999: 8000},
        {n: {0.5: ns, 0.9: 1.2 * ns, 0.99: 1.4 * ns, 0.999: 1.6 * ns} for n, ns in ((1, 1000), (9, 1800))},
        {},
    )
    made = controller(spread)
    assert made.plan(MARGIN + 1400, 30) is None
    assert made.plan(MARGIN + 1800, 30) is not None
    assert controller(spread, max_late=0.2, aim=1.0).plan(MARGIN + 1400, 30) is not None
    assert not made.begin(MARGIN + 6000)
    assert made.begin(MARGIN + 8000)


@pytest.mark.parametrize("spread", [0.02, 0.1, 0.3])
def test_late_chunks_stay_under_the_bound_and_time_is_used(spread):
    """Ten times the default bound, so that a test can count: log-normal calls, a table without spread."""
    rng = np.random.default_rng(0)
    made = controller(max_late=0.01, spread=0.05, warmup=8)
    late, tokens = 0, 0
    for _ in range(3000):
        is_late, num_tokens, _ = chunk(
            made, 14_000, lambda depth, position: rng.random() < 0.8, slow=lambda: rng.lognormal(0.0, spread)
        )
        late += is_late
        tokens += num_tokens
    assert late <= 30
    assert tokens / 3000 > 14


def test_misses_that_the_law_of_overruns_does_not_see_coming_are_held_down_by_caution():
    """The device is slow whenever little time is left, and only then: residuals say that such calls are rare."""
    made = controller(max_late=0.01)
    rng = np.random.default_rng(0)
    late, num_chunks = 0, 4000
    for _ in range(num_chunks):
        made.begin(14_000)
        made.record(took(PREFILL))
        now, m = PREFILL, 1
        while m < 32 and (plan := made.plan(14_000 - now, 32 - m)) is not None:
            ns = cost(plan.gamma)
            if 14_000 - now < 2 * ns and rng.random() < 0.05:
                ns = 14_000 - now + 1
            accepted = int(rng.integers(0, plan.gamma + 1))
            made.record(took(ns, plan.gamma, accepted))
            now, m = now + ns, m + accepted + 1
            late += now > 14_000
    assert late <= 0.012 * num_chunks
    assert made.caution > 1.0


def test_stalls_that_no_plan_could_avoid_do_not_stop_planning():
    """One call in fifty takes longer than all of the chunk's time: beyond the bound, and no reason to do nothing."""
    rng = np.random.default_rng(0)
    made = controller(max_late=0.01)
    results = [chunk(made, 14_000, slow=lambda: 100.0 if rng.random() < 0.02 else 1.0) for _ in range(800)]
    whole = [tokens >= 32 for is_late, tokens, _ in results[400:] if not is_late]
    assert np.mean(whole) > 0.9


def test_takes_constant_memory():
    made = controller()
    rng = np.random.default_rng(0)
    for _ in range(100):
        chunk(made, 14_000, slow=lambda: rng.lognormal(0.0, 0.2))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(300):
        chunk(made, 14_000, slow=lambda: rng.lognormal(0.0, 0.2))
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 40_000  # a row of the table at most, not one number per round


# ---- the law of overruns ---------------------------------------------------------------------------------------

NONE = {0.5: 1000.0}


def law(quantiles=NONE, spread=0.0, weight=1e-6, memory=1e9):
    return OverrunLaw(exceedance(quantiles, spread), weight, memory)


def test_the_law_counts_what_was_beyond():
    made = law()
    for residual in [0.0] * 90 + [0.5] * 9 + [1.0]:
        made.record(residual)
    made.fit()
    assert made.probability(-0.1) == pytest.approx(1.0)
    assert made.probability(0.25) == pytest.approx(0.1)
    assert made.probability(0.5) == pytest.approx(0.01, abs=0.011)
    assert made.quantile(0.2) == pytest.approx(0.0, abs=0.006)
    assert made.quantile(0.05) == pytest.approx(0.5, abs=0.006)


def test_beyond_what_was_seen_the_tail_goes_on_as_it_began():
    """Exponential residuals: mean excess 0.1 everywhere, P(residual > x) = exp(-x / 0.1)."""
    made = law()
    for share in (np.arange(400) + 0.5) / 400:
        made.record(-0.1 * math.log(share))
    made.fit()
    assert made.probability(0.6) == pytest.approx(math.exp(-6), rel=0.3)
    assert made.quantile(math.exp(-7)) == pytest.approx(0.7, abs=0.06)


def test_a_tail_is_no_heavier_than_one_more_call_would_make_it():
    made = law()
    for residual in [0.0] * 970 + [1.0] * 30:
        made.record(residual)
    made.fit()
    assert made.probability(1.2) <= 1 / 1001 + 1e-9
    assert made.quantile(0.002) == pytest.approx(1.0, abs=0.006)


@pytest.mark.parametrize("probability", [0.3, 0.1, 0.03, 0.01, 3e-3, 1e-3, 1e-4])
def test_quantile_and_probability_are_inverse_to_a_bin(probability):
    made = law(weight=50.0, quantiles={0.5: 1000, 0.9: 1100, 0.99: 1300})
    rng = np.random.default_rng(0)
    for residual in rng.normal(0.0, 0.15, 2000):
        made.record(residual)
    made.fit()
    x = made.quantile(probability)
    assert made.probability(x + 0.011) <= probability + 1e-12
    assert made.probability(x - 0.011) >= probability - 1e-12


def test_old_residuals_are_forgotten_and_counts_stay_finite():
    made = law(memory=50.0)
    for residual in [1.0] * 1000 + [0.0] * 4000:
        made.record(residual)
    assert made.probability(0.5) < 1e-6
    assert made.probability(-0.5) == pytest.approx(1.0)


def test_nothing_measured_for_long_goes_back_to_the_table():
    made = law(quantiles={0.5: 1000, 0.9: 1200}, weight=100.0)
    for _ in range(1000):
        made.record(2.0)
    for _ in range(300):
        made.relax(0.03)
    assert made.probability(1.0) < 0.01
    assert made.probability(math.log(1.2)) == pytest.approx(0.1, abs=0.02)


def test_a_tables_quantiles_are_met_and_its_tail_goes_on():
    share = exceedance({0.1: 900, 0.5: 1000, 0.9: 1100, 0.99: 1200, 0.999: 1300}, 0.0)
    made = OverrunLaw(share, 1e6, 1e9)
    assert (np.diff(share) <= 0).all()
    for quantile, ns in ((0.9, 1100), (0.99, 1200), (0.999, 1300)):
        assert made.probability(math.log(ns / 1000)) == pytest.approx(1 - quantile, rel=0.2)
    assert 1e-5 < made.probability(math.log(1.4)) < 3e-4


def test_the_largest_of_a_few_calls_counts_as_half_of_what_is_beyond_the_one_below():
    made = OverrunLaw(exceedance({0.1: 900, 0.5: 1000, 0.9: 1100, 1.0: 1500}, 0.0), 1e6, 1e9)
    assert made.probability(math.log(1.5)) == pytest.approx(0.05, rel=0.1)
    assert made.probability(math.log(3.0)) > 0.005


def test_a_table_without_spread_has_the_one_that_is_assumed():
    made = OverrunLaw(exceedance(NONE, 0.1), 1e6, 1e9)
    assert made.probability(0.3) == pytest.approx(0.5 * math.exp(-3), rel=0.1)
    assert OverrunLaw(exceedance(NONE, 0.0), 1e6, 1e9).probability(0.02) == 0.0


# ---- deadline: in its place ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "costs",
    [
        None,
        Costs({0.5: 5000.0}, {}, {}),
        Costs({}, {1: {0.5: 1000.0}}, {}),
        Costs({0.5: 5000.0}, {1: {0.5: 0.0}}, {}),
        Costs({0.5: 5000.0}, {1: {0.5: math.nan}}, {}),
        Costs({0.5: 5000.0}, {1: {0.5: 1000.0}}, {1: {0.5: -1.0}}),
    ],
)
def test_no_cost_table_no_controller(costs):
    with pytest.raises(BadConfig, match="cost table"):
        controller(costs)


def test_build_reads_table_and_engine_from_the_parts():
    parts = toy_parts(target=TableEngine(4, 0, max_step=3))
    made = build("controller", "deadline", parts, prior=1.0)
    made.begin(AGES)
    made.record(took(PREFILL))
    assert max(made.plan(AGES, left).gamma for left in range(1, 32)) == 2
    with pytest.raises(BadConfig, match="calibrate"):
        build("controller", "deadline", Parts(parts.domain, parts.tokenizer))


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_short_chunks(num_tokens):
    made = controller(num_tokens=num_tokens, prior=1.0)
    for left in range(1, num_tokens):
        assert made.plan(AGES, left).depth <= left - 1


def test_in_the_loop_it_is_never_late_and_leaves_no_round_unused():
    """Costs that are exactly as in the table, on a clock that only the engine and the drafter move."""
    late = {"deadline": 0, "fixed": 0}
    for name in late:
        for budget_ns in range(6000, 20000, 333):
            clock = Stopwatch()
            table = TableEngine(4, seed=1)

            class Timed(TableEngine):
                def prefill(self, inputs, clock=clock):
                    clock.advance(PREFILL)
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
                DeadlineController(Options(margin_ns=MARGIN, spread=0.0), COSTS, 40)
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
                assert clock() <= budget_ns - MARGIN
                if decoded.stop == StopReason.DEADLINE:
                    assert budget_ns - MARGIN - clock() < cost(0)
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
        ("deadline", {"max_late": 0.0}),
        ("deadline", {"max_late": 1.1}),
        ("deadline", {"aim": 0.0}),
        ("deadline", {"prior": 1.1}),
        ("deadline", {"forget": 0.0}),
        ("deadline", {"memory": 0.0}),
        ("deadline", {"gain": math.nan}),
        ("deadline", {"spread": math.inf}),
        ("deadline", {"top_k": 0}),
        ("deadline", {"least_tolerance": 0.8, "tolerance": 0.5}),
    ],
)
def test_bad_options_say_what_is_valid(name, options):
    with pytest.raises(BadConfig, match=r"need|must be"):
        build("controller", name, toy_parts(), **options)
