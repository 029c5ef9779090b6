"""What single drafters draft."""

import numpy as np
import pytest
from contract.fakes import build, greedy_path, toy_engine, toy_inputs, toy_parts

from vla_spec.decoder import SpeculativeDecoder
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory, ScoreObserver
from vla_spec.types import Plan, Scores

PLAN = Plan(4, 4)


def ints(*values):
    return np.array(values, np.int32)


def drafted(drafter, prefix, plan=PLAN):
    draft = drafter.propose(ints(*prefix), plan, None)
    assert draft.parents.tolist() == list(range(-1, len(draft.tokens) - 1))
    return draft.tokens.tolist()


def test_none_drafts_nothing():
    drafter = build("drafter", "none", toy_parts())
    drafter.begin({}, ChunkHistory(ints(*range(20)), 4))
    assert drafted(drafter, [1, 2, 3]) == []


# ---- previous_chunk -------------------------------------------------------------------------------------------


def test_previous_chunk_is_shifted_by_what_was_consumed():
    drafter = build("drafter", "previous_chunk", toy_parts())
    drafter.begin({}, ChunkHistory(ints(*range(100, 112)), 4))
    assert drafted(drafter, [7]) == [105, 106, 107, 108]
    assert drafted(drafter, [7, 8, 9]) == [107, 108, 109, 110]
    assert drafted(drafter, [7] * 7) == [111]
    assert drafted(drafter, [7] * 8) == []
    assert drafted(drafter, [7], Plan(8, 2)) == [105, 106]


def test_previous_chunk_drafts_nothing_in_the_first_chunk():
    drafter = build("drafter", "previous_chunk", toy_parts())
    drafter.begin({}, ChunkHistory(ints(*range(12)), 0))
    drafter.begin({}, None)
    assert drafted(drafter, [1]) == []


# ---- ngram ----------------------------------------------------------------------------------------------------


def ngram(history=None, **options):
    drafter = build("drafter", "ngram", toy_parts(), **{"is_aligned": False, **options})
    drafter.begin({}, None if history is None else ChunkHistory(ints(*history), 0))
    return drafter


def test_ngram_continues_the_latest_occurrence_in_this_chunk():
    assert drafted(ngram(), [1, 2, 50, 1, 2, 60, 61, 62, 63, 1, 2]) == [60, 61, 62, 63]


def test_ngram_prefers_a_longer_match_to_a_later_one():
    assert drafted(ngram(), [7, 1, 2, 50, 51, 52, 53, 9, 2, 60, 61, 62, 63, 1, 2]) == [50, 51, 52, 53]
    assert drafted(ngram(max_n=1), [7, 1, 2, 50, 51, 52, 53, 9, 2, 60, 61, 62, 63, 1, 2]) == [60, 61, 62, 63]


def test_ngram_without_a_match_of_min_n_drafts_nothing():
    assert drafted(ngram(), [1, 2, 3]) == []
    assert drafted(ngram(min_n=2), [5, 2, 50, 2]) == []
    assert drafted(ngram(min_n=2), [1, 2, 50, 51, 52, 53, 1, 2]) == [50, 51, 52, 53]


def test_ngram_looks_in_the_previous_chunk_and_stops_at_its_end():
    assert drafted(ngram([9, 1, 2, 30, 31]), [1, 2]) == [30, 31]


def test_ngram_does_not_match_across_two_chunks():
    assert drafted(ngram([9, 1], min_n=2), [2, 40, 41, 42, 43, 1, 2]) == []


def test_ngram_repeats_a_match_with_its_period():
    assert drafted(ngram(), [1, 2, 1, 2], Plan(5, 5)) == [1, 2, 1, 2, 1]


def test_aligned_ngram_matches_the_same_degree_of_freedom_only():
    # 4 tokens per step: token 5 stands at degree of freedom 1 in the past, the newest 5 at 2.
    prefix = [0, 5, 60, 61, 1, 2, 5]
    assert drafted(ngram(), prefix) == [60, 61, 1, 2]
    assert drafted(ngram(is_aligned=True), prefix) == []
    assert drafted(ngram(is_aligned=True), [0, 9, 5, 61, 62, 2, 5]) == [61, 62, 2, 5]
    assert drafted(ngram([0, 0, 5, 77, 78, 5, 88, 89], is_aligned=True), [3, 4, 5]) == [77, 78, 5, 88]


def test_ngram_options_say_what_is_valid():
    with pytest.raises(BadConfig, match="1 <= min_n <= max_n"):
        ngram(max_n=1, min_n=2)


# ---- jacobi ---------------------------------------------------------------------------------------------------


def jacobi(history=None, consumed=0):
    drafter = build("drafter", "jacobi", toy_parts())
    drafter.begin({}, None if history is None else ChunkHistory(ints(*history), consumed))
    return drafter


def rows(*choices):
    logits = np.zeros((len(choices), 256), np.float32)
    logits[np.arange(len(choices)), choices] = 1.0
    return Scores(logits)


def test_jacobi_starts_from_the_remainder_of_the_previous_chunk():
    assert drafted(jacobi(range(100, 112), 4), [7]) == [105, 106, 107, 108]


def test_jacobi_starts_from_the_previous_action_without_a_previous_chunk():
    assert drafted(jacobi(), [1, 2, 3, 4, 5], Plan(6, 6)) == [2, 3, 4, 5, 2, 3]
    assert drafted(jacobi(), [1]) == [128, 128, 128, 128]


def test_jacobi_drafts_what_the_target_predicted_in_the_last_verify():
    drafter = jacobi(range(100, 132))
    draft = drafter.propose(ints(7, 8), PLAN, None)  # of positions 2..5
    drafter.observe(draft, rows(20, 21, 22, 23, 24))  # about positions 2..6
    assert drafted(drafter, [7, 8, 20]) == [21, 22, 23, 24]
    assert drafted(drafter, [7, 8, 20, 21, 99]) == [23, 24, 107, 108]


def test_jacobi_learns_nothing_from_rounds_without_a_draft():
    drafter = jacobi(range(100, 132))
    draft = drafter.propose(ints(7, 8), Plan(0, 0), None)
    drafter.observe(draft, rows(20))
    assert drafted(drafter, [7, 8]) == [102, 103, 104, 105]


def test_jacobi_forgets_the_iterate_of_the_last_chunk():
    drafter = jacobi(range(100, 132))
    drafter.observe(drafter.propose(ints(7), PLAN, None), rows(20, 21, 22, 23, 24))
    drafter.begin({}, None)
    assert drafted(drafter, [7]) == [128, 128, 128, 128]


def test_jacobi_in_the_decoder_needs_fewer_rounds_than_without_its_iterates():
    parts = toy_parts()
    engine, num_tokens = toy_engine(parts, surprise=0.1), parts.domain.num_tokens

    class Deaf:
        """The same drafter, but the target's predictions do not reach it."""

        def __init__(self, drafter):
            self.begin, self.propose = drafter.begin, drafter.propose

    assert isinstance(jacobi(), ScoreObserver)
    assert not isinstance(Deaf(jacobi()), ScoreObserver)
    num_rounds = []
    for drafter in (jacobi(), Deaf(jacobi())):
        controller = build("controller", "fixed", parts, gamma=31)
        rng = np.random.default_rng(0)
        decoder = SpeculativeDecoder(
            engine, drafter, build("rule", "greedy", parts), controller, num_tokens, lambda: 0, rng
        )
        decoded = [decoder.decode(toy_inputs(10 * tick), 1 << 60) for tick in range(10)]
        num_rounds.append(sum(len(d.rounds) for d in decoded))
        for tick, one in enumerate(decoded):
            np.testing.assert_array_equal(one.tokens, greedy_path(engine, toy_inputs(10 * tick), num_tokens))
    assert num_rounds[0] < 0.7 * num_rounds[1]
