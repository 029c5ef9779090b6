"""What single rules do beyond the contract: options, edges and hand-made cases."""

import numpy as np
import pytest
from contract.fakes import build, toy_domain, toy_parts
from hypothesis import given
from hypothesis import strategies as st

from vla_spec.acceptance import relaxed_physical
from vla_spec.acceptance._longest_path import depths, is_chain, longest_path
from vla_spec.acceptance.rejection import _sample
from vla_spec.errors import BadConfig
from vla_spec.plugins import Parts
from vla_spec.tokenizers.uniform_bins import Options as UniformOptions
from vla_spec.tokenizers.uniform_bins import UniformBins
from vla_spec.types import Committed, Draft, Scores, TokenDomain

NONE_COMMITTED = Committed(np.empty(0, np.int32), np.empty(0, np.float32))


def logits_of(*rows):
    return Scores(np.log(np.array(rows, np.float32) + 1e-30))


# ---- longest path ---------------------------------------------------------------------------------------------


@st.composite
def trees(draw):
    k = draw(st.integers(0, 9))
    parents = [draw(st.integers(-1, node - 1)) for node in range(k)]
    accepted = draw(st.lists(st.booleans(), min_size=k, max_size=k))
    deviation = draw(st.lists(st.integers(0, 3).map(float), min_size=k, max_size=k))
    return parents, accepted, deviation


@given(trees())
def test_longest_path_is_the_best_of_all_paths(tree):
    parents, accepted, deviation = tree
    paths = [[]]
    for node, parent in enumerate(parents):
        before = [] if parent < 0 else next((path for path in paths if path and path[-1] == parent), None)
        if accepted[node] and before is not None:
            paths.append([*before, node])
    best = min(paths, key=lambda path: (-len(path), sum(deviation[node] for node in path)))
    found = longest_path(parents, accepted, deviation)
    assert found in paths
    assert len(found) == len(best)
    assert sum(deviation[n] for n in found) == sum(deviation[n] for n in best)


@given(trees())
def test_depth_is_the_number_of_ancestors(tree):
    parents = tree[0]
    for node, depth in enumerate(depths(parents)):
        steps, at = 0, parents[node]
        while at >= 0:
            steps, at = steps + 1, parents[at]
        assert depth == steps


# ---- greedy ---------------------------------------------------------------------------------------------------


def test_equal_logits_go_to_the_smaller_token():
    scores = logits_of([0.2, 0.4, 0.4], [0.4, 0.2, 0.4])
    rule = build("rule", "greedy", toy_parts())
    rng = np.random.default_rng(0)
    verdict = rule.judge(Draft.chain(np.array([1], np.int32)), scores, NONE_COMMITTED, rng)
    assert (verdict.path.tolist(), verdict.next_token) == ([0], 0)
    verdict = rule.judge(Draft.chain(np.array([2], np.int32)), scores, NONE_COMMITTED, rng)
    assert (verdict.path.tolist(), verdict.next_token) == ([], 1)


# ---- rejection ------------------------------------------------------------------------------------------------


def test_a_token_that_the_target_excludes_is_never_accepted_nor_recovered():
    scores = logits_of([0.0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3])
    rule = build("rule", "rejection", toy_parts())
    rng = np.random.default_rng(0)
    draft = Draft.chain(np.array([0], np.int32))
    for _ in range(300):
        verdict = rule.judge(draft, scores, NONE_COMMITTED, rng)
        assert len(verdict.path) == 0
        assert verdict.next_token in (1, 2)


def test_siblings_of_an_accepted_token_are_not_tried():
    scores = logits_of([0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0])
    rule = build("rule", "rejection", toy_parts())
    draft = Draft(np.array([1, 2, 1], np.int32), np.array([-1, -1, -1], np.int32))
    verdict = rule.judge(draft, scores, NONE_COMMITTED, np.random.default_rng(0))
    assert (verdict.path.tolist(), verdict.next_token) == ([0], 2)


def test_a_rejected_chosen_token_is_not_recovered():
    scores = logits_of([0.5, 0.5, 0.0], [1.0, 0.0, 0.0])
    rule = build("rule", "rejection", toy_parts())
    rng = np.random.default_rng(0)
    draft = Draft.chain(np.array([0], np.int32))
    seen = {True: set(), False: set()}
    for _ in range(300):
        verdict = rule.judge(draft, scores, NONE_COMMITTED, rng)
        seen[len(verdict.path) == 1].add(verdict.next_token)
    assert seen == {True: {0}, False: {1}}


def test_a_draft_from_the_targets_own_law_is_always_accepted():
    probs = np.array([[0.1, 0.2, 0.7]], np.float32)
    scores = logits_of(probs[0], [1 / 3, 1 / 3, 1 / 3])
    rule = build("rule", "rejection", toy_parts())
    rng = np.random.default_rng(0)
    for token in range(3):
        for _ in range(200):
            # 1e-4 for the rounding of log and exp in float32
            draft = Draft.chain(np.array([token], np.int32), probs * np.float32(1 - 1e-4))
            assert len(rule.judge(draft, scores, NONE_COMMITTED, rng).path) == 1


def test_nothing_left_over_after_a_rejection_still_gives_a_token():
    """Drafter and target agree but for rounding, and the draw falls into that gap."""
    probs = np.array([[0.25, 0.25, 0.5]], np.float32)
    scores = Scores(np.log(probs.repeat(2, 0)))
    rule = build("rule", "rejection", toy_parts())

    class Highest:
        def random(self):
            return 1.0 - 2.0**-53

    draft = Draft.chain(np.array([0], np.int32), probs * np.float32(1.5))
    verdict = rule.judge(draft, scores, NONE_COMMITTED, Highest())
    assert len(verdict.path) == 0
    assert 0 <= verdict.next_token < 3


@given(
    st.lists(st.sampled_from([0.0, 1e-12, 0.3, 1.0, 5.0]), min_size=1, max_size=8), st.floats(0, 1, exclude_max=True)
)
def test_sampling_never_draws_weight_zero(weights, point):
    class Fixed:
        def random(self):
            return point

    array = np.array(weights)
    if array.sum() > 0:
        assert array[_sample(array, Fixed())] > 0


# ---- relaxed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("offset", "is_accepted"), [(-10, False), (-9, True), (9, True), (10, False)])
def test_relaxed_bins_accepts_up_to_and_including_its_radius(offset, is_accepted):
    logits = np.zeros((2, 256), np.float32)
    logits[:, 100] = 5.0
    rule = build("rule", "relaxed_bins", toy_parts(), max_bins=9)
    draft = Draft.chain(np.array([100 + offset], np.int32))
    verdict = rule.judge(draft, Scores(logits), NONE_COMMITTED, np.random.default_rng(0))
    assert (len(verdict.path) == 1) == is_accepted
    assert verdict.deviation.tolist() == ([9.0] if is_accepted else [])
    halved = rule.judge(draft, Scores(logits), NONE_COMMITTED, np.random.default_rng(0), tolerance=0.5)
    assert len(halved.path) == 0


def test_typical_needs_less_probability_where_the_target_is_unsure():
    rule = build("rule", "typical", toy_parts(), epsilon=0.09, delta=0.3)
    sure = np.array([0.94, 0.06, *[0.0] * 8])  # exp(-entropy) = 0.80, threshold min(0.09, 0.24)
    unsure = np.array([0.14, 0.06, *[0.1] * 8])  # exp(-entropy) = 0.10, threshold min(0.09, 0.03)
    draft = Draft.chain(np.array([1], np.int32))
    rng = np.random.default_rng(0)
    assert len(rule.judge(draft, logits_of(sure, sure), NONE_COMMITTED, rng).path) == 0
    assert len(rule.judge(draft, logits_of(unsure, unsure), NONE_COMMITTED, rng).path) == 1


def test_typical_threshold_is_epsilon_where_the_target_is_sure():
    sure = np.array([0.79, 0.21])  # delta * exp(-entropy) = 0.239
    draft, rng = Draft.chain(np.array([1], np.int32)), np.random.default_rng(0)
    for epsilon, is_accepted in ((0.2, True), (0.22, False)):
        rule = build("rule", "typical", toy_parts(), epsilon=epsilon, delta=0.4)
        assert (len(rule.judge(draft, logits_of(sure, sure), NONE_COMMITTED, rng).path) == 1) == is_accepted


def test_tolerance_divides_the_typical_threshold():
    probs = np.array([0.85, 0.15])
    rule = build("rule", "typical", toy_parts(), epsilon=0.09)
    draft, rng = Draft.chain(np.array([1], np.int32)), np.random.default_rng(0)
    for tolerance, is_accepted in ((1.0, True), (0.7, True), (0.5, False)):
        verdict = rule.judge(draft, logits_of(probs, probs), NONE_COMMITTED, rng, tolerance)
        assert (len(verdict.path) == 1) == is_accepted


@pytest.mark.parametrize(("tolerance", "num_accepted"), [(1.0, 2), (0.75, 1), (0.25, 0)])
def test_tolerance_scales_cap_and_budget(tolerance, num_accepted):
    parts = toy_parts()
    unit = float(parts.domain.unit_per_bin[0])
    rule = build("rule", "relaxed_physical", parts, cap=(9 * unit + 1e-9,), budget=(6 * unit + 1e-9,))
    logits = np.zeros((3, 256), np.float32)
    logits[:, 100] = 5.0
    draft = Draft.chain(np.array([103, 103], np.int32))
    verdict = rule.judge(draft, Scores(logits), NONE_COMMITTED, np.random.default_rng(0), tolerance)
    assert len(verdict.path) == num_accepted


def test_typical_threshold_is_the_papers():
    rng = np.random.default_rng(0)
    epsilon, delta = 0.2, 0.4
    rule = build("rule", "typical", toy_parts(), epsilon=epsilon, delta=delta)
    num_accepted = 0
    for _ in range(200):
        probs = rng.dirichlet(np.full(6, rng.choice([0.2, 1.0, 5.0])))
        token = int(rng.integers(6))
        entropy = -(probs * np.log(probs + 1e-300)).sum()
        threshold = min(epsilon, delta * np.exp(-entropy))
        if abs(probs[token] - threshold) < 1e-4:
            continue
        expected = probs[token] > threshold or token == probs.argmax()
        scores = logits_of(probs, probs)
        verdict = rule.judge(Draft.chain(np.array([token], np.int32)), scores, NONE_COMMITTED, rng)
        assert (len(verdict.path) == 1) == expected
        num_accepted += expected and token != probs.argmax()
    assert num_accepted > 10


def test_one_group_with_two_budgets_is_refused():
    with pytest.raises(BadConfig, match="one group has one budget"):
        build("rule", "relaxed_physical", toy_parts(), budget=(0.001, 0.002, 0.001, 0.0))


def test_caps_and_budgets_may_differ_between_degrees_of_freedom():
    parts = toy_parts()
    unit = float(parts.domain.unit_per_bin[0])
    cap = (2 * unit + 1e-9, 5 * unit + 1e-9, 0.0, 0.0)
    rule = build("rule", "relaxed_physical", parts, cap=cap, budget=(0.01, 0.01, 0.01, 0.0))
    logits = np.zeros((2, 256), np.float32)
    logits[:, 100] = 5.0
    draft = Draft.chain(np.array([104], np.int32))
    for position, is_accepted in enumerate([False, True, False, False]):
        committed = Committed(np.zeros(position, np.int32), np.zeros(position, np.float32))
        verdict = rule.judge(draft, Scores(logits), committed, np.random.default_rng(0))
        assert (len(verdict.path) == 1) == is_accepted


def test_a_bin_of_two_sizes_is_refused():
    parts = toy_parts()
    wrong = Parts(toy_domain(unit_per_bin=0.5), parts.tokenizer)
    with pytest.raises(BadConfig, match="set the tokenizer's unit"):
        build("rule", "relaxed_physical", wrong)


def test_a_cap_below_one_bin_is_refused_as_a_wrong_unit():
    with pytest.raises(BadConfig, match="less than one bin"):
        build("rule", "relaxed_physical", toy_parts(), cap=(1e-6,))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("relaxed_bins", {"max_bins": -1}, "max_bins must be >= 0, got -1"),
        ("relaxed_physical", {"cap": (-0.1,)}, "cap must be numbers >= 0"),
        ("relaxed_physical", {"budget": ()}, "budget must be numbers >= 0"),
        ("relaxed_physical", {"cap": (0.1, 0.1)}, "cap needs 1 or 4 numbers, got 2"),
        ("rejection", {"temperature": -1.0}, "temperature must be a number >= 0"),
        ("rejection", {"temperature": float("nan")}, "temperature must be a number >= 0"),
        ("typical", {"epsilon": 0.0}, "must be > 0"),
        ("typical", {"temperature": 0.0}, "temperature must be a number > 0"),
    ],
)
def test_bad_options_say_what_is_valid(name, options, message):
    with pytest.raises(BadConfig, match=message):
        build("rule", name, toy_parts(), **options)


@pytest.mark.timing
@pytest.mark.parametrize("name", ["greedy", "relaxed_bins", "relaxed_physical", "typical", "rejection"])
def test_judging_a_chain_takes_less_than_60_us(name):
    import time

    rule = build("rule", name, toy_parts())
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(9, 256)).astype(np.float32)
    draft = Draft.chain(logits.argmax(1)[:8].astype(np.int32))
    times = []
    for _ in range(500):
        start = time.perf_counter_ns()
        rule.judge(draft, Scores(logits), NONE_COMMITTED, rng)
        times.append(time.perf_counter_ns() - start)
    assert np.median(times) < 60_000


def test_relative_tolerance_grows_with_the_motion_of_the_target() -> None:
    """A tenth of the way off is accepted where the target moves far, and refused where it moves little."""
    tokenizer = UniformBins(UniformOptions(unit=(0.01,)))
    domain = TokenDomain(
        256, 4, 4, np.array([0, 0, 0, 1], np.int32), np.array([False, False, False, True]),
        np.full(4, 0.01 * 2 / 256, np.float32),
    )  # fmt: skip
    rule = relaxed_physical.RelaxedPhysicalRule(
        relaxed_physical.Options(cap=(0.0001,), budget=(0.01,), relative=0.1), domain, tokenizer
    )

    def judged(choice: int, drafted: int) -> int:
        logits = np.zeros((2, 256), np.float32)
        logits[:, choice] = 5.0
        draft = Draft.chain(np.array([drafted], np.int32))
        none = Committed(np.zeros(0, np.int32), np.zeros(0, np.float32))
        return len(rule.judge(draft, Scores(logits), none, np.random.default_rng(0)).path)

    assert judged(choice=255, drafted=245) == 1  # 10 bins of 127 from rest: 8 %
    assert judged(choice=255, drafted=235) == 0  # 16 %
    assert judged(choice=138, drafted=148) == 0  # the same 10 bins where the target moves by 10


@given(st.integers(0, 2**32 - 1), st.integers(0, 12), st.integers(0, 6))
def test_a_chain_is_judged_as_the_tree_that_it_is(seed, k, num_committed):
    """The short way for drafts without branches gives the verdict of the general one."""
    rng = np.random.default_rng(seed)
    parts = toy_parts()
    unit = float(parts.domain.unit_per_bin[0])
    options = {"cap": (3 * unit,), "budget": (5 * unit,), "relative": 0.1}
    short, general = (build("rule", "relaxed_physical", parts, **options) for _ in range(2))
    general._place = []
    vocab = parts.domain.vocab_size
    logits = rng.normal(size=(k + 1, vocab)).astype(np.float32)
    drafted = np.clip(logits[:-1].argmax(1) + rng.integers(-3, 4, k), 0, vocab - 1).astype(np.int32)
    committed = Committed(
        rng.integers(0, vocab, num_committed).astype(np.int32),
        (unit * rng.integers(0, 3, num_committed)).astype(np.float32),
    )
    got, expected = (rule.judge(Draft.chain(drafted), Scores(logits), committed, rng) for rule in (short, general))
    assert got.next_token == expected.next_token
    np.testing.assert_array_equal(got.path, expected.path)
    np.testing.assert_array_equal(got.relaxed, expected.relaxed)
    np.testing.assert_allclose(got.deviation, expected.deviation, rtol=1e-4, atol=1e-9)


@given(trees())
def test_only_a_chain_is_a_chain(tree):
    parents = np.array(tree[0], np.int32)
    assert is_chain(parents) == (tree[0] == list(range(-1, len(tree[0]) - 1)))
