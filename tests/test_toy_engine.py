import numpy as np
import pytest
from contract.fakes import build, greedy_path, toy_engine, toy_inputs, toy_parts

from vla_spec.engines.toy import Options, ToyEngine
from vla_spec.errors import BadConfig


def chunks(num_ticks, steps_per_tick=2, **options):
    parts = toy_parts()
    engine = toy_engine(parts, **options)
    num_dofs, num_tokens = parts.domain.tokens_per_step, parts.domain.num_tokens
    found = [greedy_path(engine, toy_inputs(tick * steps_per_tick), num_tokens) for tick in range(num_ticks)]
    shift = steps_per_tick * num_dofs
    pairs = zip(found[1:], found[:-1], strict=True)
    return found, float(np.mean([new[: num_tokens - shift] == old[shift:] for new, old in pairs]))


def test_successive_chunks_overlap_and_drift_says_how_much():
    _, none = chunks(20, drift=0.0, surprise=0.0, noise=0.0)
    _, little = chunks(20, drift=0.1, surprise=0.0, noise=0.0)
    _, much = chunks(20, drift=0.8, surprise=0.0, noise=0.0)
    assert none == 1.0
    assert 0.8 < little < 0.97
    assert much < 0.5
    assert 0.6 < chunks(20)[1] < 0.95  # by default


def test_the_plan_moves_with_time_and_with_the_instruction():
    engine = toy_engine(toy_parts())
    first = greedy_path(engine, toy_inputs(), 32)
    assert (greedy_path(engine, toy_inputs(step=10), 32) != first).mean() > 0.5
    assert (greedy_path(engine, toy_inputs(words=(3,)), 32) != first).mean() > 0.5


def test_it_is_repeatable_and_the_seed_changes_it():
    one, two = toy_engine(toy_parts(seed=1)), toy_engine(toy_parts(seed=1))
    np.testing.assert_array_equal(one.prefill(toy_inputs()).logits, two.prefill(toy_inputs()).logits)
    assert one.info.model_hash == two.info.model_hash
    other = toy_engine(toy_parts(seed=2))
    assert other.info.model_hash != one.info.model_hash
    assert (other.prefill(toy_inputs()).logits != one.prefill(toy_inputs()).logits).any()


def test_the_last_token_changes_the_next_choice_at_a_share_surprise_of_contexts():
    engine = toy_engine(toy_parts(), surprise=0.4, noise=0.0)
    engine.prefill(toy_inputs())
    tokens = np.arange(30, dtype=np.int32)
    choices = engine.step(tokens, np.full(30, -1, np.int32)).logits.argmax(1)
    usual = np.bincount(choices).argmax()
    assert 0.2 < (choices != usual).mean() < 0.6
    assert np.abs(choices - usual).max() <= 4


def test_pretended_time_goes_to_the_hook_only():
    spent = []
    parts = toy_parts()
    options = Options(prefill_ms=5.0, step_base_ms=1.0, step_per_token_ms=0.25)
    engine = ToyEngine(options, parts.domain, spent.append)
    engine.prefill(toy_inputs())
    engine.step(np.arange(3, dtype=np.int32), np.array([-1, 0, 0], np.int32))
    engine.commit(np.zeros(1, np.int32))
    assert spent == [5_000_000, 1_750_000]
    engine.sleep_ns = None
    engine.step(np.zeros(1, np.int32), np.array([-1], np.int32))
    assert len(spent) == 2
    built = build("engine", "toy", parts, prefill_ms=2.0)
    built.sleep_ns = spent.append
    built.prefill(toy_inputs())
    assert spent[2:] == [2_000_000]


def test_a_path_that_is_none_is_refused():
    engine = toy_engine(toy_parts())
    engine.prefill(toy_inputs())
    engine.step(np.arange(4, dtype=np.int32), np.array([-1, 0, 0, 1], np.int32))
    with pytest.raises(AssertionError, match="parent"):
        engine.commit(np.array([0, 2, 3], np.int32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 16}, "token domain has 256"),
        ({"num_tokens": 16}, "token domain has 32"),
        ({"drift": 1.5}, "drift must be in"),
        ({"max_step": 0}, "max_step >= 1"),
        ({"spread": 0.0}, "spread > 0"),
        ({"prefill_ms": -1.0}, "prefill_ms must be >= 0"),
    ],
)
def test_bad_options_say_what_is_valid(options, message):
    with pytest.raises(BadConfig, match=message):
        toy_engine(toy_parts(), **options)
