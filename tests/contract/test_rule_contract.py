"""What every acceptance rule promises. Exactness is proved here: by equality where decoding is greedy, by the total
variation distance from an enumerated law where it is sampled."""

import numpy as np
import pytest

from contract.fakes import (
    Scripted,
    TableEngine,
    build,
    greedy_path,
    random_tree,
    toy_engine,
    toy_inputs,
    toy_parts,
    tree_drafter,
)
from vla_spec.acceptance.greedy import GreedyRule
from vla_spec.decoder import SpeculativeDecoder
from vla_spec.interfaces import AcceptanceRule, ChunkHistory
from vla_spec.types import EMPTY_DRAFT, Committed, Draft, Provenance, Scores, StopReason, Verdict

NO_DEADLINE = 1 << 60
NONE_COMMITTED = Committed(np.empty(0, np.int32), np.empty(0, np.float32))


def peaked(rng, n, vocab_size=256):
    """Logits with one broad peak per row, as of a target that knows roughly where to go. float32 [n, V]."""
    best = rng.integers(8, vocab_size - 8, n)
    bins = np.arange(vocab_size)
    logits = -((bins - best[:, None]) ** 2) / 18 + rng.normal(0, 0.1, (n, vocab_size))
    return logits.astype(np.float32)


def sure(rng, n):
    """As `peaked`, but so sure that sampling has no choice either."""
    logits = peaked(rng, n)
    logits[np.arange(n), logits.argmax(1)] += 1000
    return logits


def near_miss_tree(rng, k, logits, spread):
    """A random tree whose tokens lie within ``spread`` bins of the target's choice; siblings differ."""
    parents = random_tree(rng, k, max_children=2 * spread + 1)
    choice, used, tokens = logits.argmax(1), {}, []
    for parent in parents.tolist():
        free = [o for o in range(-spread, spread + 1) if o not in used.setdefault(parent, set())]
        offset = int(rng.choice(free))
        used[parent].add(offset)
        tokens.append(int(choice[parent + 1]) + offset)
    return Draft(np.array(tokens, np.int32), parents)


def path_tokens(draft, verdict):
    return [*draft.tokens[verdict.path].tolist(), verdict.next_token]


def is_sampled(rule):
    """Does plain decoding with this rule use random numbers."""
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    rule.judge(EMPTY_DRAFT, Scores(peaked(rng, 1)[:1]), NONE_COMMITTED, rng)
    used = np.random.default_rng(0)
    peaked(used, 1)
    return rng.bit_generator.state != used.bit_generator.state and before is not None


def greedy_rules_of(name, parts):
    """The rule with its defaults, and at temperature 0 where it has one."""
    yield build("rule", name, parts)
    if name == "rejection":
        yield build("rule", name, parts, temperature=0.0)


def decode(engine, drafter, rule, num_tokens, inputs, gamma=8, depth=None, history=None, rng=None, tolerance=1.0):
    parts = toy_parts()
    controller = build("controller", "fixed", parts, gamma=gamma, depth=depth, tolerance=tolerance)
    rng = np.random.default_rng(0) if rng is None else rng
    decoder = SpeculativeDecoder(engine, drafter, rule, controller, num_tokens, lambda: 0, rng)
    return decoder.decode(inputs, NO_DEADLINE, history)


# ---- verdicts -------------------------------------------------------------------------------------------------


def test_has_the_interface(rule):
    assert isinstance(rule.thing, AcceptanceRule)
    assert isinstance(rule.thing.exact, bool)


@pytest.mark.parametrize("seed", range(20))
def test_verdict_is_well_formed(rule, seed):
    rng = np.random.default_rng(seed)
    k = int(rng.integers(0, 16))
    logits = peaked(rng, k + 1)
    draft = near_miss_tree(rng, k, logits, 3)
    m = int(rng.integers(0, 12))
    committed = Committed(np.zeros(m, np.int32), np.zeros(m, np.float32))
    verdict = rule.thing.judge(draft, Scores(logits), committed, rng)
    assert verdict.path.dtype == np.int32
    assert verdict.relaxed.dtype == np.bool_
    assert verdict.deviation.dtype == np.float32
    assert isinstance(verdict.next_token, int)
    assert len(verdict.path) == len(verdict.relaxed) == len(verdict.deviation) <= k
    assert 0 <= verdict.next_token < 256
    parent = -1
    for node in verdict.path.tolist():
        assert draft.parents[node] == parent
        parent = node
    assert ((verdict.deviation > 0) == verdict.relaxed).all()
    if rule.thing.exact:
        assert not verdict.relaxed.any()


@pytest.mark.parametrize("seed", range(5))
def test_judging_is_a_pure_function(rule, seed):
    rng = np.random.default_rng(seed)
    logits = peaked(rng, 9)
    draft = near_miss_tree(rng, 8, logits, 2)
    committed = Committed(np.array([1, 2], np.int32), np.array([0.0, 1e-4], np.float32))
    copies = [logits.copy(), draft.tokens.copy(), draft.parents.copy(), committed.deviation.copy()]
    first = rule.thing.judge(draft, Scores(logits), committed, np.random.default_rng(7))
    rule.thing.judge(near_miss_tree(rng, 5, logits, 2), Scores(logits[:6]), NONE_COMMITTED, rng)
    again = rule.thing.judge(draft, Scores(logits), committed, np.random.default_rng(7))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    for before, after in zip(copies, [logits, draft.tokens, draft.parents, committed.deviation], strict=True):
        np.testing.assert_array_equal(before, after)


def test_empty_draft_is_plain_decoding(rule):
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits = peaked(rng, 1)
        verdict = rule.thing.judge(EMPTY_DRAFT, Scores(logits), NONE_COMMITTED, rng)
        assert len(verdict.path) == len(verdict.relaxed) == len(verdict.deviation) == 0
        if not is_sampled(rule.thing):
            assert verdict.next_token == logits[0].argmax()


def test_perfect_draft_is_accepted_whole(rule):
    rng = np.random.default_rng(0)
    logits = sure(rng, 9)
    draft = Draft.chain(logits.argmax(1)[:8].astype(np.int32))
    verdict = rule.thing.judge(draft, Scores(logits), NONE_COMMITTED, rng)
    assert verdict.path.tolist() == list(range(8))
    assert verdict.next_token == logits[8].argmax()
    assert not verdict.relaxed.any()


def test_a_draft_far_off_is_rejected_and_the_targets_token_recovered(rule):
    rng = np.random.default_rng(0)
    logits = sure(rng, 5)
    choice = logits.argmax(1)
    tokens = choice[:4].astype(np.int32)
    tokens[2] = (tokens[2] + 128) % 256
    verdict = rule.thing.judge(Draft.chain(tokens), Scores(logits), NONE_COMMITTED, rng)
    assert verdict.path.tolist() == [0, 1]
    assert verdict.next_token == choice[2]


def test_the_right_branch_is_found_among_wrong_ones(rule):
    rng = np.random.default_rng(0)
    logits = sure(rng, 6)
    choice = logits.argmax(1)
    wrong = (choice + 128) % 256
    #        -1 -> 0 (wrong), 1 (right) -> 2 (wrong), 3 (right) -> 4 (right)
    tokens = np.array([wrong[0], choice[0], wrong[2], choice[2], choice[4]], np.int32)
    verdict = rule.thing.judge(
        Draft(tokens, np.array([-1, -1, 1, 1, 3], np.int32)), Scores(logits), NONE_COMMITTED, rng
    )
    assert verdict.path.tolist() == [1, 3, 4]
    assert verdict.next_token == choice[5]


# ---- greedy exactness -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter_kind", ["none", "ngram", "previous_chunk", "jacobi", "noisy_tree", "wild_tree"])
def test_greedy_speculation_equals_plain_autoregression(rule_name, drafter_kind):
    parts = toy_parts()
    engine = toy_engine(parts, surprise=0.3, noise=0.2)
    num_tokens = parts.domain.num_tokens
    rules = [r for r in greedy_rules_of(rule_name, parts) if r.exact and not is_sampled(r)]
    if not rules:
        pytest.skip(f"rule {rule_name} is not greedy and exact by its defaults")
    rng = np.random.default_rng(3)
    reference = toy_engine(parts, surprise=0.3, noise=0.2)

    def best_after(prefix):
        scores = reference.prefill(inputs)
        for token in prefix:
            scores = reference.step(np.array([token], np.int32), np.array([-1], np.int32))
            reference.commit(np.zeros(1, np.int32))
        return int(scores.logits[-1].argmax())

    num_accepted = 0
    for rule in rules:
        history = None
        for tick in range(4):
            inputs = toy_inputs(step=4 * tick)
            if drafter_kind == "noisy_tree":
                drafter = tree_drafter(rng, 256, best_after, error=0.3)
            elif drafter_kind == "wild_tree":
                drafter = tree_drafter(rng, 256)
            else:
                drafter = build("drafter", drafter_kind, parts)
            decoded = decode(engine, drafter, rule, num_tokens, inputs, history=history, rng=rng, depth=5)
            np.testing.assert_array_equal(decoded.tokens, greedy_path(reference, inputs, num_tokens))
            assert (decoded.provenance == Provenance.EXACT).all()
            assert not decoded.deviation.any()
            assert decoded.stop == StopReason.COMPLETE
            num_accepted += sum(r.num_accepted for r in decoded.rounds)
            history = ChunkHistory(decoded.tokens, 16)
    if drafter_kind not in ("none", "wild_tree"):
        assert num_accepted > 0, "nothing was ever accepted: the test shows nothing"


@pytest.mark.parametrize("name", ["relaxed_bins", "relaxed_physical", "typical"])
@pytest.mark.parametrize("seed", range(30))
def test_tolerance_zero_is_the_greedy_rule(name, seed):
    rng = np.random.default_rng(seed)
    rule = build("rule", name, toy_parts())
    logits = peaked(rng, 13)
    draft = near_miss_tree(rng, 12, logits, 1)
    expected = GreedyRule().judge(draft, Scores(logits), NONE_COMMITTED, rng)
    found = rule.judge(draft, Scores(logits), NONE_COMMITTED, rng, tolerance=0.0)
    assert path_tokens(draft, found) == path_tokens(draft, expected)
    assert not found.relaxed.any()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("relaxed_bins", {"max_bins": 0}),
        ("relaxed_physical", {"cap": (0.0,)}),
        ("relaxed_physical", {"budget": (0.0,)}),
        ("typical", {"delta": 1e9, "epsilon": 1.0}),
    ],
)
@pytest.mark.parametrize("seed", range(15))
def test_zero_options_are_the_greedy_rule(name, options, seed):
    rng = np.random.default_rng(seed)
    rule = build("rule", name, toy_parts(), **options)
    logits = peaked(rng, 13)
    draft = near_miss_tree(rng, 12, logits, 1)
    expected = GreedyRule().judge(draft, Scores(logits), NONE_COMMITTED, rng)
    assert path_tokens(draft, rule.judge(draft, Scores(logits), NONE_COMMITTED, rng)) == path_tokens(draft, expected)
    assert rule.exact == (name != "typical")


# ---- relaxed rules --------------------------------------------------------------------------------------------

RELAXED = ["relaxed_bins", "relaxed_physical", "typical"]


@pytest.mark.parametrize("name", RELAXED)
def test_accepted_length_is_monotone_in_the_tolerance(name):
    rule = build("rule", name, toy_parts())
    grew = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        logits = peaked(rng, 16)
        draft = near_miss_tree(rng, 15, logits, 6)
        lengths = [
            len(rule.judge(draft, Scores(logits), NONE_COMMITTED, rng, tolerance).path)
            for tolerance in np.linspace(0.0, 1.0, 9).tolist()
        ]
        assert lengths == sorted(lengths)
        grew += lengths[-1] > lengths[0]
    assert grew > 20


@pytest.mark.parametrize("name", RELAXED)
def test_never_relaxed_positions_stay_exact(name):
    parts = toy_parts()
    respectful = build("rule", name, parts)
    careless = build("rule", name, parts, respect_never_relaxed=False)
    switch = parts.domain.tokens_per_step - 1
    rng = np.random.default_rng(0)
    for first in range(parts.domain.num_tokens - 1):
        logits = peaked(rng, 4)
        choice = logits.argmax(1)
        tokens = choice[:3].astype(np.int32) + 1
        committed = Committed(np.zeros(first, np.int32), np.zeros(first, np.float32))
        verdict = respectful.judge(Draft.chain(tokens), Scores(logits), committed, rng)
        for depth, is_relaxed in enumerate(verdict.relaxed.tolist()):
            assert not (is_relaxed and parts.domain.never_relaxed[first + depth]), f"{first=} {depth=}"
        if first % parts.domain.tokens_per_step == switch:
            assert len(verdict.path) == 0
            if name != "relaxed_physical":  # a switch has its own unit there
                assert careless.judge(Draft.chain(tokens), Scores(logits), committed, rng).relaxed[0]
        else:
            assert verdict.relaxed[0], "a relaxable position one bin off was rejected: the test shows nothing"


@pytest.mark.parametrize("name", RELAXED)
def test_the_accepted_token_is_the_drafts_and_the_longest_path_wins(name):
    rule = build("rule", name, toy_parts())
    rng = np.random.default_rng(0)
    logits = peaked(rng, 5)
    choice = logits.argmax(1)
    # Node 0 is exact and a dead end; node 1 is off by one bin and goes on to node 2.
    tokens = np.array([choice[0], choice[0] + 1, choice[2], (choice[1] + 99) % 256], np.int32)
    draft = Draft(tokens, np.array([-1, -1, 1, 0], np.int32))
    verdict = rule.judge(draft, Scores(logits), NONE_COMMITTED, rng)
    assert verdict.path.tolist() == [1, 2]
    assert verdict.relaxed.tolist() == [True, False]
    assert verdict.next_token == choice[3]


@pytest.mark.parametrize("name", RELAXED)
def test_among_equally_long_paths_the_least_deviation_wins(name):
    rule = build("rule", name, toy_parts())
    rng = np.random.default_rng(0)
    logits = peaked(rng, 4)
    choice = logits.argmax(1)
    tokens = np.array([choice[0] + 2, choice[0], choice[0] - 1], np.int32)
    verdict = rule.judge(Draft(tokens, np.full(3, -1, np.int32)), Scores(logits), NONE_COMMITTED, rng)
    assert verdict.path.tolist() == [1]
    tokens[1] = choice[0] + 3
    verdict = rule.judge(Draft(tokens, np.full(3, -1, np.int32)), Scores(logits), NONE_COMMITTED, rng)
    assert verdict.path.tolist() == [2]


@pytest.mark.parametrize("name", RELAXED)
def test_provenance_and_deviation_say_what_the_target_would_have_done(name):
    """Recompute the target's own choice after every (relaxed) prefix and compare with what was reported."""
    parts = toy_parts()
    engine = toy_engine(parts, surprise=0.3)
    rule = build("rule", name, parts)
    rng = np.random.default_rng(5)
    num_relaxed = 0
    for tick in range(6):
        inputs = toy_inputs(tick)
        guess = greedy_path(engine, inputs, parts.domain.num_tokens)
        drafter = tree_drafter(rng, 256, lambda before, guess=guess: int(guess[len(before)]), error=0.6, spread=6)
        decoded = decode(engine, drafter, rule, parts.domain.num_tokens, inputs, gamma=12, rng=rng)
        logits = engine.prefill(inputs).logits[0].copy()
        for position, token in enumerate(decoded.tokens.tolist()):
            choice = int(logits.argmax())
            is_relaxed = token != choice
            assert decoded.provenance[position] == (Provenance.RELAXED if is_relaxed else Provenance.EXACT)
            expected = abs(token - choice)
            if name == "relaxed_physical":
                args = (np.array([token]), np.array([choice]), np.array([position]))
                expected = parts.tokenizer.distance(*args)[0]
            assert decoded.deviation[position] == pytest.approx(expected, rel=1e-5)
            num_relaxed += is_relaxed
            logits = engine.step(np.array([token], np.int32), np.array([-1], np.int32)).logits[0].copy()
            engine.commit(np.zeros(1, np.int32))
    assert num_relaxed > 10


def test_group_budgets_and_caps_hold_over_all_rounds_of_a_chunk():
    parts = toy_parts()
    domain, engine = parts.domain, toy_engine(parts, surprise=0.2)
    cap, budget = 4.5 * domain.unit_per_bin[0], 6.5 * domain.unit_per_bin[0]
    rule = build("rule", "relaxed_physical", parts, cap=(cap,), budget=(budget,))
    rng = np.random.default_rng(1)
    sums, most = [], 0.0
    for tick in range(40):
        inputs = toy_inputs(tick)
        guess = greedy_path(engine, inputs, domain.num_tokens)
        drafter = tree_drafter(rng, 256, lambda before, guess=guess: int(guess[len(before)]), error=0.8, spread=5)
        decoded = decode(engine, drafter, rule, domain.num_tokens, inputs, gamma=12, depth=5, rng=rng)
        assert not decoded.deviation[domain.never_relaxed].any()
        sums.append(np.bincount(domain.group, decoded.deviation))
        most = max(most, float(decoded.deviation.max()))
    assert max(map(np.max, sums)) <= budget * (1 + 1e-5)
    assert max(map(np.max, sums)) > cap, "no group ever spent more than one token's cap: the test shows nothing"
    assert 0.5 * cap < most <= cap * (1 + 1e-6)


@pytest.mark.parametrize("num_committed", [0, 1, 2])
def test_group_budget_counts_committed_tokens_and_the_drafts_own_path(num_committed):
    """Translation of step 0 is one group; each token is 3 bins off and the budget is 6 bins."""
    parts = toy_parts()
    unit = float(parts.domain.unit_per_bin[0])
    rule = build("rule", "relaxed_physical", parts, cap=(3 * unit + 1e-9,), budget=(6 * unit + 1e-9,))
    rng = np.random.default_rng(0)
    logits = peaked(rng, 4)
    tokens = logits.argmax(1)[:3].astype(np.int32) + 3
    committed = Committed(np.zeros(num_committed, np.int32), np.full(num_committed, 3 * unit, np.float32))
    verdict = rule.judge(Draft.chain(tokens), Scores(logits), committed, rng)
    assert len(verdict.path) == 2 - num_committed
    # An exact token costs nothing, whatever was spent.
    tokens[0] -= 3
    verdict = rule.judge(Draft.chain(tokens), Scores(logits), committed, rng)
    assert verdict.relaxed.tolist()[:1] == [False]


def test_a_new_group_has_a_fresh_budget():
    parts = toy_parts()
    unit = float(parts.domain.unit_per_bin[0])
    rule = build("rule", "relaxed_physical", parts, cap=(3 * unit + 1e-9,), budget=(3 * unit + 1e-9,))
    rng = np.random.default_rng(0)
    logits = peaked(rng, 5)
    tokens = logits.argmax(1)[:4].astype(np.int32)
    tokens[[0, 2]] += 3  # positions 2 and 4: the last translation of step 0, the first of step 1
    committed = Committed(np.zeros(2, np.int32), np.zeros(2, np.float32))
    verdict = rule.judge(Draft.chain(tokens), Scores(logits), committed, rng)
    assert verdict.path.tolist() == [0, 1, 2, 3]
    assert verdict.relaxed.tolist() == [True, False, True, False]


# ---- sampled exactness ----------------------------------------------------------------------------------------

NUM_BINS, NUM_TOKENS, NUM_SAMPLES = 3, 4, 6000  # 1 token of the prefill, then drafts up to 2 deep and what follows


def draft_law(prefix, vocab_size=NUM_BINS):
    """The drafter's distribution after a prefix: random, and not the target's."""
    rng = np.random.default_rng([99, len(prefix), *prefix])
    return rng.dirichlet(np.ones(vocab_size)).astype(np.float32)


def sampled_chain(rng, law):
    def make(prefix, plan, history):
        tokens, probs = [], []
        for _ in range(min(plan.gamma, plan.depth)):
            probs.append(law((*prefix.tolist(), *tokens)))
            tokens.append(int(rng.choice(len(probs[-1]), p=probs[-1] / probs[-1].sum(dtype=np.float64))))
        return Draft.chain(np.array(tokens, np.int32), np.array(probs, np.float32))

    return Scripted(make)


def grown_tree(rng, law, pick):
    """Depth-first pairs of siblings; ``pick(rng, probs)`` yields (token, row) of one sibling after the other."""

    def make(prefix, plan, history):
        tokens, parents, probs = [], [], []

        def grow(parent, before, depth):
            if depth == plan.depth:
                return
            for token, row in pick(rng, law(before)):
                if len(tokens) == plan.gamma:
                    return
                tokens.append(token)
                parents.append(parent)
                probs.append(row)
                grow(len(tokens) - 1, (*before, token), depth + 1)

        grow(-1, tuple(prefix.tolist()), 0)
        rows = None if any(row is None for row in probs) else np.array(probs, np.float32)
        return Draft(np.array(tokens, np.int32), np.array(parents, np.int32), rows)

    return Scripted(make)


def with_replacement(rng, probs):
    for _ in range(2):
        yield int(rng.choice(len(probs), p=probs / probs.sum(dtype=np.float64))), probs


def without_replacement(rng, probs):
    left = probs.astype(np.float64)
    for _ in range(2):
        left = left / left.sum()
        token = int(rng.choice(len(left), p=left))
        yield token, left.astype(np.float32)
        left[token] = 0.0


def best_two(rng, probs):
    for token in np.argsort(-probs, kind="stable")[:2].tolist():
        yield token, None


LAWS = {
    "chain": lambda rng, table: sampled_chain(rng, draft_law),
    "perfect_chain": lambda rng, table: sampled_chain(rng, lambda before: table.probs(before).astype(np.float32)),
    "point_mass_chain": lambda rng, table: Scripted(
        lambda prefix, plan, history: Draft.chain(np.array([1, 0, 2][: min(plan.gamma, plan.depth)], np.int32))
    ),
    "tree_with_replacement": lambda rng, table: grown_tree(rng, draft_law, with_replacement),
    "tree_without_replacement": lambda rng, table: grown_tree(rng, draft_law, without_replacement),
    "point_mass_tree": lambda rng, table: grown_tree(rng, draft_law, best_two),
    "nothing": lambda rng, table: Scripted(lambda prefix, plan, history: EMPTY_DRAFT),
}


def total_variation(counts, law):
    return 0.5 * float(np.abs(counts / counts.sum() - law.reshape(-1)).sum())


def noise_floor(law):
    """The statistic of direct sampling: its largest value in 2000 repetitions with the same number of samples."""
    rng = np.random.default_rng(0)
    samples = rng.multinomial(NUM_SAMPLES, law.reshape(-1), 2000)
    return max(total_variation(counts, law) for counts in samples)


def joint_counts(rule, make_drafter, table, seed=11):
    rng = np.random.default_rng(seed)
    controller = build("controller", "fixed", toy_parts(), gamma=6, depth=2)
    drafter = make_drafter(rng, table)
    decoder = SpeculativeDecoder(table, drafter, rule, controller, NUM_TOKENS, lambda: 0, rng)
    counts, num_accepted = np.zeros(NUM_BINS**NUM_TOKENS), 0
    for _ in range(NUM_SAMPLES):
        decoded = decoder.decode({}, NO_DEADLINE)
        counts[np.ravel_multi_index(decoded.tokens, (NUM_BINS,) * NUM_TOKENS)] += 1
        num_accepted += sum(r.num_accepted for r in decoded.rounds)
    return counts, num_accepted


@pytest.mark.parametrize("kind", LAWS)
def test_sampled_speculation_has_the_targets_law(rule_name, kind):
    rule = build("rule", rule_name, toy_parts())
    if not (rule.exact and is_sampled(rule)):
        pytest.skip(f"rule {rule_name} is not exact and sampled")
    table = TableEngine(NUM_BINS, seed=4)
    law = table.joint(NUM_TOKENS)
    counts, num_accepted = joint_counts(rule, LAWS[kind], table)
    assert total_variation(counts, law) <= noise_floor(law)
    assert (num_accepted > 0) == (kind != "nothing")
    if kind == "perfect_chain":
        assert num_accepted == 2 * NUM_SAMPLES  # the whole draft, then the bonus


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_shapes_the_law(temperature):
    table = TableEngine(NUM_BINS, seed=4)
    rule = build("rule", "rejection", toy_parts(), temperature=temperature)
    law = table.joint(NUM_TOKENS, temperature)
    counts, _ = joint_counts(rule, LAWS["tree_with_replacement"], table)
    assert total_variation(counts, law) <= noise_floor(law)
    assert total_variation(counts, table.joint(NUM_TOKENS)) > noise_floor(law), "the temperature changed nothing"


class NaiveRule:
    """The common mistake: after a rejection it samples the target's distribution instead of the residual."""

    exact = True

    def judge(self, draft, scores, committed, rng, tolerance=1.0):
        probs = np.exp(scores.logits - scores.logits.max(1, keepdims=True)).astype(np.float64)
        probs /= probs.sum(1, keepdims=True)
        path = []
        for node, token in enumerate(draft.tokens.tolist()):
            if rng.random() * draft.probs[node, token] >= probs[node, token]:
                break
            path.append(node)
        nothing = np.zeros(len(path), np.float32)
        following = int(rng.choice(NUM_BINS, p=probs[len(path)]))
        return Verdict(np.array(path, np.int32), following, nothing > 0, nothing)


def test_the_law_test_can_fail():
    table = TableEngine(NUM_BINS, seed=4)
    law = table.joint(NUM_TOKENS)
    counts, _ = joint_counts(NaiveRule(), LAWS["chain"], table)
    assert total_variation(counts, law) > noise_floor(law)
