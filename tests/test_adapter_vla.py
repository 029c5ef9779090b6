import json
from pathlib import Path

import numpy as np
import pytest

from vla_spec import plugins
from vla_spec.adapters import vla
from vla_spec.errors import BadConfig, BadModel, BadObservation, BadToken, UnknownOption
from vla_spec.types import Observation

CONFIG = {
    "image_size": 8,
    "num_cameras": 3,
    "state_size": 4,
    "horizon": 2,
    "action_size": 4,
    "max_words": 4,
    "vocabulary": ["<pad>", "<unknown>", "open", "the", "drawer", "door", "close"],
    "tokenizer": {"name": "uniform_bins", "low": [-1, -1, -1, -1], "high": [1, 1, 1, 1], "vocab_size": 256},
    "never_relaxed_dofs": [3],
    "groups": [0, 0, 0, 1],
    "state_low": [-0.5, 0.4, 0.0, 0.0],
    "state_high": [0.5, 1.0, 0.4, 1.0],
}
IMAGES = np.zeros((3, 8, 8, 3), np.uint8)
STATE = np.array([0, 0.6, 0.2, 1], np.float32)


@pytest.fixture
def load(tmp_path):
    def write(**changes):
        values = {k: v for k, v in (CONFIG | changes).items() if v is not None}
        (tmp_path / "policy.json").write_text(json.dumps(values))
        return vla.load(tmp_path)

    return write


@pytest.fixture
def adapter(load):
    return load()


def observe(images=IMAGES, state=STATE, instruction="open the drawer"):
    return Observation(images, state, instruction, 0, 0)


def words(adapter, instruction):
    return adapter.encode(observe(instruction=instruction))["words"].tolist()


def test_inputs_have_the_names_shapes_and_types_that_engines_take(adapter):
    inputs = adapter.encode(observe())
    assert {name: (array.dtype.name, array.shape) for name, array in inputs.items()} == {
        "images": ("uint8", (1, 3, 8, 8, 3)),
        "words": ("int64", (1, 4)),
        "state": ("float32", (1, 4)),
    }
    np.testing.assert_array_equal(inputs["state"][0], STATE)


def test_words_ignore_case_and_punctuation_and_are_padded(adapter):
    assert words(adapter, "  Open, the DRAWER!") == [[2, 3, 4, 0]]


def test_a_word_that_is_not_known_is_the_unknown_word_and_counted(adapter):
    assert words(adapter, "open teh drawer") == [[2, 1, 4, 0]]
    assert adapter.num_with_unknown_words == 1


def test_long_instructions_are_cut_off_and_counted(adapter):
    assert words(adapter, "open the door the drawer close") == [[2, 3, 5, 3]]
    assert adapter.num_truncated == 1
    words(adapter, "open the door")
    assert adapter.num_truncated == 1


@pytest.mark.parametrize("instruction", ["", "   ", "?!", None, 7])
def test_an_instruction_that_says_nothing_is_refused(adapter, instruction):
    with pytest.raises(BadObservation, match=r"instruction is .*valid: a sentence"):
        adapter.encode(observe(instruction=instruction))


def test_an_instruction_without_a_known_word_is_told_the_known_ones(adapter):
    with pytest.raises(BadObservation, match="no word is known; valid: a sentence of close, door, drawer, open, the"):
        adapter.encode(observe(instruction="fly to the-moon".replace("the", "a")))


def test_padding_and_unknown_are_no_words_of_the_user(adapter):
    with pytest.raises(BadObservation, match="no word is known"):
        adapter.encode(observe(instruction="unknown pad"))
    assert adapter.words == ["close", "door", "drawer", "open", "the"]


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (IMAGES.astype(np.float32), "float32"),
        (IMAGES[:2], r"\[2, 8, 8, 3\]"),
        (np.zeros((3, 9, 8, 3), np.uint8), r"\[3, 9, 8, 3\]"),
        (np.zeros((3, 3, 8, 8), np.uint8), r"\[3, 3, 8, 8\]"),
        (None, "a NoneType"),
    ],
)
def test_wrong_pictures_are_refused_with_what_is_right(adapter, images, found):
    with pytest.raises(BadObservation, match=rf"images is .*{found}.*valid: uint8 \[3, 8, 8, 3\]"):
        adapter.encode(observe(images=images))


def test_wrong_states_are_refused_with_their_place(adapter):
    for state, message in (
        (np.array([0, np.nan, 0, 0], np.float32), r"state\[1\] is nan; valid: 4 finite numbers"),
        (np.array([0, 0.6, np.inf, 0], np.float32), r"state\[2\] is inf"),
        (np.zeros(3, np.float32), r"state is float32 \[3\]"),
        (np.zeros((1, 4), np.float32), r"state is float32 \[1, 4\]"),
        ([0, 0, 0, 0], "state is a list"),
        (np.array([0, 600, 200, 1], np.float32), r"state\[1\] is 600.0; valid: about 0.4"),  # millimetres
    ):
        with pytest.raises(BadObservation, match=message):
            adapter.encode(observe(state=state))


def test_a_state_somewhat_outside_its_range_is_counted_and_used_as_it_is(adapter):
    state = np.array([0.6, 0.6, 0.2, 1], np.float32)
    np.testing.assert_array_equal(adapter.encode(observe(state=state))["state"][0], state)
    assert adapter.num_out_of_range == 1


def test_the_example_is_valid(adapter):
    assert adapter.encode(adapter.example())["words"].tolist() == [[2, 0, 0, 0]]


def test_domain_says_what_each_position_means(adapter):
    domain = adapter.domain
    assert (domain.vocab_size, domain.num_tokens, domain.tokens_per_step) == (256, 8, 4)
    assert domain.group.tolist() == [0, 0, 0, 1, 2, 2, 2, 3]  # step * number of groups + group
    assert domain.never_relaxed.tolist() == [False, False, False, True] * 2
    assert domain.unit_per_bin.tolist() == pytest.approx([2 / 256, 2 / 256, 2 / 256, 1] * 2)
    assert (domain.group.dtype, domain.never_relaxed.dtype, domain.unit_per_bin.dtype) == ("int32", "bool", "float32")


def test_physical_size_of_a_bin_comes_from_the_tokenizers_unit(load):
    tokenizer = CONFIG["tokenizer"] | {"unit": [0.01, 0.01, 0.01, 1]}
    assert load(tokenizer=tokenizer).domain.unit_per_bin[:4].tolist() == pytest.approx([0.02 / 256] * 3 + [1])


def test_limits_may_be_one_number_for_all(load):
    one = load(tokenizer={"name": "uniform_bins", "low": -2, "high": 2, "vocab_size": 4})
    assert one.decode(np.array([0, 1, 2, 3], np.int32)).tolist() == [[-1.5, -0.5, 0.5, 1.5]]


def test_decode_leaves_out_a_started_step(adapter):
    actions = adapter.decode(np.array([0, 128, 255, 0, 7, 7], np.int32))
    assert actions.shape == (1, 4)
    np.testing.assert_array_equal(actions, adapter.tokenizer.decode(np.array([0, 128, 255, 0], np.int32)))
    assert adapter.decode(np.empty(0, np.int32)).shape == (0, 4)


def test_token_ids_outside_the_domain_are_refused_with_their_place(adapter):
    for token in (256, -1):
        with pytest.raises(BadToken, match=rf"id {token} at position 1; valid: 0\.\.255"):
            adapter.decode(np.array([3, token, 4, 5], np.int32))


def test_it_is_a_plugin_that_needs_a_folder(load, tmp_path):
    load()
    plugin = plugins.load("adapter", "vla")
    parts = plugins.Parts(None, None, model_dir=tmp_path)
    assert plugin.build(plugin.options(), parts).domain.num_tokens == 8
    with pytest.raises(BadConfig, match="needs model_dir"):
        plugin.build(plugin.options(), plugins.Parts(None, None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": None}, r"missing keys \['horizon'\]"),
        ({"colour": 1}, r"unknown keys \['colour'\]"),
        ({"horizon": 0}, "horizon is 0; valid: a whole number from 1"),
        ({"image_size": 8.5}, "image_size is 8.5"),
        ({"vocabulary": ["<pad>", "<unknown>"]}, "vocabulary has no words"),
        ({"groups": [0, 0, 1]}, "groups is .* action_size = 4"),
        ({"state_low": [9, 9, 9, 9]}, "must lie below"),
        ({"never_relaxed_dofs": [4]}, r"never_relaxed_dofs has \[4\]"),
        ({"tokenizer": {"low": 0}}, "tokenizer is .*a name"),
        ({"tokenizer": {"name": "uniform_bins", "colour": 1}}, r"no option \['colour'\]"),
        ({"tokenizer": {"name": "uniform_bins", "low": [0], "high": [1]}}, r"one step to \[4, 1\]; valid: \[1, 4\]"),
    ],
)
def test_a_model_folder_that_contradicts_itself_is_refused(load, changes, message):
    with pytest.raises(BadModel, match=message):
        load(**changes)


def test_a_tokenizer_that_does_not_exist_is_refused_with_the_closest(load):
    with pytest.raises(UnknownOption, match=r"policy\.json: tokenizer.*did you mean 'uniform_bins'"):
        load(tokenizer={"name": "uniform_bin"})


def test_a_folder_without_a_policy_is_refused(tmp_path):
    with pytest.raises(BadModel, match="no such file"):
        vla.load(tmp_path)
    Path(tmp_path / "policy.json").write_text("{")
    with pytest.raises(BadModel, match="not JSON"):
        vla.load(tmp_path)
