"""The oracle against every schedule that there is."""

import numpy as np
import pytest

from vla_spec.errors import BadConfig
from vla_spec.oracle import accepted_runs, best_chunk, best_tokens, expected_tokens


def by_enumeration(prefill_ns, step_ns, draft_ns, accepted, budget_ns, num_tokens, max_step):
    """Most tokens, then the earliest, over all sequences of draft lengths."""
    found = []

    def go_on(m, at_ns, index):
        found.append((m, -at_ns))
        for gamma in range(min(max_step - 1, num_tokens - 1) + 1 if m < num_tokens else 0):
            done_ns = at_ns + step_ns(index, gamma + 1) + (draft_ns(index, gamma) if gamma else 0)
            if done_ns <= budget_ns:
                go_on(min(m + min(gamma, accepted[m]) + 1, num_tokens), done_ns, index + 1)

    if prefill_ns > budget_ns:
        return 0, 0
    go_on(1, prefill_ns, 0)
    m, at_ns = max(found)
    return m, -at_ns


@pytest.mark.parametrize("is_monotone", [True, False])
def test_finds_what_trying_everything_finds(is_monotone):
    rng = np.random.default_rng(0)
    for _ in range(150):
        num_tokens, max_step = int(rng.integers(1, 9)), int(rng.integers(1, 6))
        steps, drafts = rng.integers(5, 40, (9, 7)), rng.integers(0, 10, (9, 7))
        if is_monotone:
            steps = np.sort(steps, axis=1)
        accepted, budget_ns = rng.integers(0, 5, num_tokens).tolist(), int(rng.integers(5, 150))

        def step_ns(index, n, steps=steps):
            return int(steps[index, n])

        def draft_ns(index, gamma, drafts=drafts):
            return int(drafts[index, gamma])

        case = 10, step_ns, draft_ns, accepted, budget_ns, num_tokens, max_step
        best = best_chunk(*case)
        assert (best.num_tokens, best.finish_ns) == by_enumeration(*case)
        assert best_tokens(*case) == best.num_tokens
        m, at_ns = min(best.num_tokens, 1), 10 * min(best.num_tokens, 1)
        for index, gamma in enumerate(best.gammas):  # the schedule that it names is one that does it
            at_ns += step_ns(index, gamma + 1) + (draft_ns(index, gamma) if gamma else 0)
            m = min(m + min(gamma, accepted[m]) + 1, num_tokens)
        assert (m, at_ns) == (best.num_tokens, best.finish_ns)


def test_drafts_exactly_what_will_be_accepted():
    best = best_chunk(10, lambda _, n: 10 + n, lambda *_: 1, [0, 3, 0, 0, 0, 2, 0, 0, 0, 0], 10_000, 8, 16)
    assert best == (8, 10 + 15 + 14, (3, 2))


def test_without_a_draft_accepted_it_is_plain_decoding():
    args = (lambda _, n: 10 + n, lambda *_: 1, [0] * 8)
    assert best_chunk(10, *args, 10 + 7 * 11, 8, 16) == (8, 87, (0,) * 7)
    assert best_chunk(10, *args, 10 + 7 * 11 - 1, 8, 16) == (7, 76, (0,) * 6)
    assert best_chunk(10, *args, 9, 8, 16) == (0, 0, ())


def test_waits_for_no_stall():
    """A call that lies ahead and takes too long is not begun."""
    best = best_chunk(10, lambda index, n: 10**6 if index == 2 else 10, lambda *_: 0, [0] * 8, 1000, 8, 16)
    assert best.num_tokens == 3


def expectation_by_recursion(prefill_ns, step_ns, draft_ns, survival, budget_ns, num_tokens, max_step):
    def still_to_come(index, m, left_ns):
        best = 0.0
        for gamma in range(max(min(max_step, num_tokens - m) - 1, 0) + 1 if m < num_tokens else 0):
            cost_ns = step_ns(index, gamma + 1) + (draft_ns(index, gamma) if gamma else 0)
            if cost_ns <= left_ns:
                expected = 0.0
                for gained in range(gamma + 1):
                    chance = survival[m, gained] - (survival[m, gained + 1] if gained < gamma else 0.0)
                    expected += chance * (gained + 1 + still_to_come(index + 1, m + gained + 1, left_ns - cost_ns))
                best = max(best, expected)
        return best

    return 1.0 + still_to_come(0, 1, budget_ns - prefill_ns) if prefill_ns <= budget_ns else 0.0


def test_without_knowing_what_is_accepted_it_expects_what_the_best_policy_gets():
    rng = np.random.default_rng(1)
    for _ in range(60):
        num_tokens, max_step = int(rng.integers(1, 8)), int(rng.integers(1, 6))
        steps, drafts = rng.integers(5, 40, (9, 9)), rng.integers(0, 10, (9, 9))
        survival = np.cumprod(np.hstack((np.ones((num_tokens, 1)), rng.random((num_tokens, 8)))), axis=1)
        budget_ns = int(rng.integers(5, 150))

        def step_ns(index, n, steps=steps):
            return int(steps[index, n])

        def draft_ns(index, gamma, drafts=drafts):
            return int(drafts[index, gamma])

        case = 10, step_ns, draft_ns, survival, budget_ns, num_tokens, max_step
        assert expected_tokens(*case, bin_ns=1.0) == pytest.approx(expectation_by_recursion(*case), abs=1e-9)


def test_who_knows_the_answers_gets_at_least_what_is_expected_of_who_knows_their_law():
    rng = np.random.default_rng(2)
    num_tokens, accept = 12, 0.7
    law = np.tile(accept ** np.arange(num_tokens), (num_tokens, 1))
    got = []
    for _ in range(300):
        matches = rng.random(num_tokens) < accept
        got.append(best_tokens(10, lambda _, n: 8 + n, lambda *_: 1, accepted_runs(matches), 60, num_tokens, 8))
    assert np.mean(got) > expected_tokens(10, lambda _, n: 8 + n, lambda *_: 1, law, 60, num_tokens, 8, bin_ns=1.0)


def test_runs_are_counted_backwards():
    assert accepted_runs([True, True, False, True]).tolist() == [2, 1, 0, 1]
    assert accepted_runs([]).tolist() == []


@pytest.mark.parametrize(("num_tokens", "max_step"), [(0, 4), (4, 0), (6, 4)])
def test_bad_sizes_say_what_is_valid(num_tokens, max_step):
    with pytest.raises(BadConfig, match="valid: 1 or more"):
        best_chunk(1, lambda *_: 1, lambda *_: 1, [0] * 5, 10, num_tokens, max_step)
    with pytest.raises(BadConfig, match="valid: 1 or more"):
        expected_tokens(1, lambda *_: 1, lambda *_: 1, np.ones((5, 3)), 10, num_tokens, max_step, 1.0)
