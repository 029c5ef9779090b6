"""Forecasts of the Kalman drafter, worked out by hand where motion is linear."""

import numpy as np
import pytest
from contract.fakes import Scripted, build, greedy_path, toy_engine, toy_inputs, toy_parts

from vla_spec.drafters.kalman import KalmanDrafter, Options, _gains
from vla_spec.errors import BadConfig
from vla_spec.interfaces import ChunkHistory
from vla_spec.types import EMPTY_DRAFT, Draft, Plan

WHOLE = Plan(31, 31)
SURE = {"acceleration_noise": 1.0, "measurement_noise": 1e-3, "damping": 1.0}  # believes what it sees


def kalman(**options):
    return build("drafter", "kalman", toy_parts(), **{**SURE, **options})


def rows(*per_dof):
    """Tokens, time-major, from one list of bins per degree of freedom."""
    return np.array(per_dof, np.int32).T.reshape(-1)


def forecast(drafter, prefix, plan=WHOLE, history=None):
    drafter.begin({}, history)
    draft = drafter.propose(prefix, plan, None)
    assert draft.parents.tolist() == list(range(-1, len(draft.tokens) - 1))
    return draft.tokens


def test_constant_velocity_goes_on():
    prefix = rows([100, 103, 106, 109], [140, 138, 136, 134], [60, 60, 60, 60], [255, 255, 255, 255])
    tokens = forecast(kalman(), prefix, Plan(12, 12)).reshape(-1, 4)
    assert tokens.T.tolist() == [[112, 115, 118], [132, 130, 128], [60, 60, 60], [255, 255, 255]]


def test_the_previous_chunks_played_steps_are_part_of_the_motion():
    played = rows([100, 103, 106], [140, 138, 136], [60, 60, 60], [255, 255, 255])
    planned = rows([1, 2], [3, 4], [5, 6], [0, 0])  # not played: says nothing about the motion
    history = ChunkHistory(np.concatenate((played, planned)), 12)
    tokens = forecast(kalman(), np.array([109], np.int32), Plan(7, 7), history)
    assert tokens.tolist() == [134, 60, 255, 112, 132, 60, 255]


def test_a_started_step_is_completed_by_the_degrees_of_freedom_that_are_missing():
    """KERV: tokens 0..p-1 are kept, p.. come from the filter; what was kept counts as an action."""
    whole = rows([100, 103, 106], [140, 138, 136], [60, 60, 60], [255, 255, 255])
    prefix = np.concatenate((whole, [109, 134])).astype(np.int32)
    assert forecast(kalman(), prefix, Plan(6, 6)).tolist() == [60, 255, 112, 132, 60, 255]


def test_damping_zero_holds_the_last_value():
    prefix = rows([100, 103, 106], [140, 138, 136], [60, 60, 60], [255, 0, 255])
    tokens = forecast(kalman(damping=0.0), prefix, Plan(8, 8)).reshape(-1, 4)
    assert tokens.tolist() == [[106, 136, 60, 255]] * 2


def test_damping_slows_the_forecast_down():
    prefix = rows([100, 108, 116], [0, 0, 0], [0, 0, 0], [0, 0, 0])
    tokens = forecast(kalman(damping=0.5), prefix, Plan(12, 12)).reshape(-1, 4)
    assert tokens[:, 0].tolist() == [120, 122, 123]


def test_switches_are_held_and_never_extrapolated():
    prefix = rows([100, 100], [100, 100], [100, 100], [0, 128])
    assert forecast(kalman(), prefix, Plan(8, 8)).reshape(-1, 4)[:, 3].tolist() == [128, 128]


def test_what_was_never_seen_is_not_drafted():
    assert forecast(kalman(), np.array([100], np.int32)).tolist() == []
    assert forecast(kalman(), np.array([100, 101, 102, 255], np.int32), Plan(3, 3)).tolist() == [100, 101, 102]


def test_the_forecast_ends_with_the_chunk_and_stays_in_range():
    prefix = rows(*[[250, 252, 254, 255, 255, 255, 255]] * 3, [0] * 7)
    tokens = forecast(kalman(), prefix)
    assert len(tokens) == 4
    assert tokens.max() <= 255


def test_noise_is_averaged_and_more_trusted_measurements_less():
    """A jump of one action moves a smooth filter little and a nervous one much."""
    prefix = rows([100, 100, 100, 100, 140], [0] * 5, [0] * 5, [0] * 5)
    smooth = forecast(kalman(acceleration_noise=0.001, measurement_noise=1.0, damping=0.0), prefix, Plan(1, 1))[0]
    nervous = forecast(kalman(damping=0.0), prefix, Plan(1, 1))[0]
    assert nervous == 140
    assert 100 < smooth < 130


def test_gains_are_those_of_the_textbook_filter():
    """Against the matrix recursion."""
    q, r = 0.3, 0.2
    options = Options(context=6, acceleration_noise=q, measurement_noise=r)
    f, h = np.array([[1.0, 1], [0, 1]]), np.array([[1.0, 0]])
    noise = q**2 * np.array([[0.25, 0.5], [0.5, 1]])
    p = np.diag([r**2, max(100 * q**2, r**2)])
    for gain in _gains(options):
        p = f @ p @ f.T + noise
        k = p @ h.T / (h @ p @ h.T + r**2)
        p = (np.eye(2) - k @ h) @ p
        np.testing.assert_allclose(gain, k[:, 0])


# ---- with a base ----------------------------------------------------------------------------------------------


class Listening(Scripted):
    heard = 0

    def observe(self, draft, scores):
        self.heard += 1


def completed(base, **options):
    parts = toy_parts()
    return KalmanDrafter(Options(**{**SURE, **options}), parts.domain, parts.tokenizer, base)


PREFIX = rows([100, 103], [140, 138], [60, 60], [255, 255])  # 8 of 32 tokens


def chain(*tokens):
    return Scripted(lambda prefix, plan, history: Draft.chain(np.array(tokens[: plan.gamma], np.int32)))


def test_a_request_for_all_missing_tokens_is_completed():
    drafter = completed(chain(107, 136))  # one bin more than the filter's own forecast
    drafter.begin({}, None)
    draft = drafter.propose(PREFIX, Plan(24, 24), None)
    assert len(draft.tokens) == 24
    assert draft.parents.tolist() == list(range(-1, 23))
    assert draft.tokens[:8].tolist() == [107, 136, 60, 255, 111, 134, 60, 255]  # the base's tokens bend the motion


def test_a_draft_that_will_be_verified_is_left_alone_unless_asked_for():
    for complete, expected in (("rest", [107, 136]), ("always", [107, 136, 60, 255, 111])):
        drafter = completed(chain(107, 136), complete=complete)
        drafter.begin({}, None)
        assert drafter.propose(PREFIX, Plan(5, 5), None).tokens.tolist() == expected


def test_a_tree_is_completed_along_its_first_path():
    tree = Draft(np.array([106, 107, 136, 9], np.int32), np.array([-1, -1, 0, 1], np.int32))
    drafter = completed(Scripted(lambda prefix, plan, history: tree), complete="always")
    drafter.begin({}, None)
    draft = drafter.propose(PREFIX, Plan(7, 4), None)
    assert draft.tokens.tolist() == [106, 107, 136, 9, 60, 255]  # depth 4 of the first path: 106, 136, 60, 255
    assert draft.parents.tolist() == [-1, -1, 0, 1, 2, 4]
    assert len(drafter.propose(PREFIX, Plan(5, 4), None).tokens) == 5


def test_drawn_drafts_keep_their_law():
    probs = np.full((1, 256), 1 / 256, np.float32)
    drawn = Draft.chain(np.array([7], np.int32), probs)
    drafter = completed(Scripted(lambda prefix, plan, history: drawn), complete="always")
    drafter.begin({}, None)
    assert drafter.propose(PREFIX, WHOLE, None) is drawn


def test_the_base_hears_of_chunks_and_scores():
    base = Listening(lambda prefix, plan, history: EMPTY_DRAFT)
    drafter = completed(base)
    history = ChunkHistory(PREFIX, 4)
    drafter.begin({}, history)
    drafter.observe(EMPTY_DRAFT, None)
    assert base.history is history
    assert base.heard == 1
    completed(chain(1)).observe(EMPTY_DRAFT, None)  # one that does not listen is left in peace


def test_it_is_a_better_draft_than_none_on_a_smooth_plan():
    """Along the toy target's own path, exact acceptance of the next step's three moving tokens within two bins."""
    parts = toy_parts()
    engine = toy_engine(parts, surprise=0.0, drift=0.0)
    tokens = greedy_path(engine, toy_inputs(0), parts.domain.num_tokens)
    drafter = build("drafter", "kalman", parts)
    errors = {"kalman": [], "held": []}
    for m in range(12, 32, 4):
        found = forecast(drafter, tokens[:m], Plan(4, 4))
        errors["kalman"].append(np.abs(found[:3] - tokens[m : m + 3]).mean())
        errors["held"].append(np.abs(tokens[m - 4 : m - 1] - tokens[m : m + 3]).mean())
    assert np.mean(errors["kalman"]) < np.mean(errors["held"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be 1 or more, got 0"),
        ({"measurement_noise": 0.0}, "measurement_noise > 0"),
        ({"damping": 1.2}, r"damping must be in \[0, 1\], got 1.2"),
        ({"base": "kalman"}, "base must be another drafter"),
    ],
)
def test_options_that_can_not_be_right(options, message):
    with pytest.raises(BadConfig, match=message):
        kalman(**options)
