"""Configuration: what resolves, and what every error says."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from pydantic import Field

from vla_spec import config, plugins
from vla_spec.config import as_tree, build_options, merge, mode_names, read_mode, read_tree, resolve, set_key, to_yaml
from vla_spec.errors import BadConfig, MissingDependency, UnknownOption

TOY = {"engine": "toy", "robot": "toy"}


def message_of(tree, error=(BadConfig, UnknownOption)):
    with pytest.raises(error) as caught:
        resolve({**TOY, **tree})
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_an_empty_tree_is_plain_decoding():
    resolved = resolve(TOY)
    assert (resolved.drafter.name, resolved.rule.name, resolved.controller.name) == ("none", "greedy", "fixed")
    assert resolved.runtime.execute_horizon == 4


@pytest.mark.parametrize("name", mode_names())
def test_every_shipped_mode_names_plugins_and_options_that_exist(name):
    mode, tree = read_mode(name)
    resolved = resolve(merge(tree, TOY), mode)
    assert resolved.mode == name
    assert resolved.description.endswith(".")


def test_shipped_modes_cover_the_published_methods():
    assert {"autoregressive", "exact", "relaxed", "spec_vla", "jacobi", "previous_chunk", "ngram", "block"} <= set(
        mode_names()
    )
    spec_vla = resolve(merge(read_mode("spec_vla")[1], TOY))
    assert spec_vla.drafter.name == "feature_head"
    assert spec_vla.rule.options.max_bins == 9


@pytest.mark.parametrize("name", ["autoregressive", "spec_vla", "relaxed", "ngram"])
def test_a_resolved_configuration_survives_being_written_and_read(name, tmp_path):
    resolved = resolve(merge(read_mode(name)[1], TOY), name)
    file = tmp_path / "mode.yaml"
    file.write_text(to_yaml(resolved))
    again = resolve(read_tree(file))
    assert again == resolved
    assert as_tree(again) == as_tree(resolved)


def test_a_resolved_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve(TOY).seed = 3


def test_unknown_option_names_the_path_and_the_closest():
    text = message_of({"drafter": {"name": "ngram", "max_nn": 3}})
    assert text.startswith("drafter.max_nn: no option named 'max_nn'; have ")
    assert text.endswith("did you mean 'max_n'?")


def test_unknown_plugin_names_the_path_all_names_and_the_closest():
    text = message_of({"drafter": "ngrm"})
    assert text.startswith("drafter: no drafter named 'ngrm'; have ")
    assert all(name in text for name in plugins.names("drafter"))
    assert text.endswith("did you mean 'ngram'?")


def test_unknown_key_at_the_top():
    assert "contoller: no option named 'contoller'" in message_of({"contoller": "fixed"})


@pytest.mark.parametrize(
    ("tree", "path", "value"),
    [
        ({"drafter": {"name": "ngram", "max_n": "many"}}, "drafter.max_n", "'many'"),
        ({"runtime": {"deadline_ms": -3}}, "runtime.deadline_ms", "-3"),
        ({"runtime": {"deadline_ms": "soon"}}, "runtime.deadline_ms", "'soon'"),
        ({"runtime": {"execute_horizon": 0}}, "runtime.execute_horizon", "0"),
        ({"runtime": {"clock": "reel"}}, "runtime.clock", "'reel'"),
        ({"runtime": 3}, "runtime", "3"),
        ({"num_threads": 0}, "num_threads", "0"),
        ({"seed": -1}, "seed", "-1"),
        ({"drafter": {"max_n": 3}}, "drafter", "{'max_n': 3}"),
        ({"drafter": 7}, "drafter", "7"),
        ({"controller": {"name": "fixed", "gamma": -1}}, "controller", "-1"),
    ],
)
def test_a_wrong_value_names_path_and_value(tree, path, value):
    text = message_of(tree)
    assert text.startswith(f"{path}: ")
    assert value in text


def test_a_wrong_choice_lists_the_valid_ones():
    text = message_of({"runtime": {"clock": "reel"}})
    assert "'real'" in text
    assert "'lockstep'" in text


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"drafter": {"name": "ngram", "max_nn": 3}}, "mode mine: drafter.max_nn: no option named 'max_nn'; have "),
        ({"drafter": {"name": "ngram", "max_n": "x"}}, "mode mine: drafter.max_n: "),
        ({"drafter": "ngrm"}, "mode mine: drafter: no drafter named 'ngrm'"),
        ({"contoller": "fixed"}, "mode mine: contoller: no option named 'contoller'"),
        ({"runtime": {"deadline_ms": -3}}, "mode mine: runtime.deadline_ms: "),
    ],
)
def test_an_error_names_the_mode_and_stays_what_it_is(tree, message):
    with pytest.raises((BadConfig, UnknownOption)) as plain:
        resolve({**TOY, **tree})
    with pytest.raises(type(plain.value)) as named:
        resolve({**TOY, **tree}, "mine")
    assert str(named.value).startswith(message)
    assert str(named.value) == f"mode mine: {plain.value}"
    assert vars(named.value) == vars(plain.value)


def test_one_number_stands_for_a_tuple_of_one():
    resolved = resolve({**TOY, "rule": {"name": "relaxed_physical", "cap": 0.1}})
    assert resolved.rule.options.cap == (0.1,)


@dataclass(frozen=True)
class Sample:
    gamma: Annotated[int, Field(ge=1)] = 4
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] | None = None


def test_options_are_checked_against_the_dataclass():
    assert build_options(Sample, {"sizes": [1, 2]}, "x") == Sample(sizes=(1, 2))
    assert build_options(Sample, None, "x") == Sample()
    with pytest.raises(BadConfig, match=r"^x\.gamma: .*got 0$"):
        build_options(Sample, {"gamma": 0}, "x")
    with pytest.raises(BadConfig, match="expected keys and values, got 'list'"):
        build_options(Sample, "list", "x")


def test_merging_keeps_options_of_the_same_plugin_and_drops_those_of_another():
    base = {"drafter": {"name": "ngram", "max_n": 3}, "runtime": {"deadline_ms": 5, "clock": "real"}}
    assert merge(base, {"drafter": {"min_n": 2}})["drafter"] == {"name": "ngram", "max_n": 3, "min_n": 2}
    assert merge(base, {"drafter": {"name": "jacobi"}})["drafter"] == {"name": "jacobi"}
    assert merge(base, {"drafter": "none"})["drafter"] == "none"
    assert merge(base, {"runtime": {"deadline_ms": 7}})["runtime"] == {"deadline_ms": 7, "clock": "real"}
    assert base["drafter"] == {"name": "ngram", "max_n": 3}


def test_set_key_reads_yaml_values():
    tree = set_key({"drafter": "ngram"}, "drafter.max_n=5")
    assert tree == {"drafter": {"name": "ngram", "max_n": 5}}
    assert set_key({}, "runtime.clock=virtual") == {"runtime": {"clock": "virtual"}}
    for wrong in ("drafter", "=3", "a..b=1", "a=[1"):
        with pytest.raises(BadConfig, match="--set"):
            set_key({}, wrong)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(BadConfig, match=r"nothing\.yaml: can't be read"):
        read_tree(tmp_path / "nothing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: 1\nb: [1, 2\n")
    with pytest.raises(BadConfig, match=r"broken\.yaml line \d+: not valid YAML"):
        read_tree(broken)
    broken.write_text("- 1\n- 2\n")
    with pytest.raises(BadConfig, match="expected keys and values"):
        read_tree(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadConfig):
        read_tree(broken)
    broken.write_text("")
    assert read_tree(broken) == {}


def test_an_own_mode_is_a_path(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("drafter: ngram\n")
    assert read_mode(str(file)) == ("mine", {"drafter": "ngram"})
    with pytest.raises(UnknownOption, match="did you mean 'exact'"):
        read_mode("exat")


def test_a_plugin_without_its_library_says_how_to_get_it(monkeypatch):
    def load(kind, name, where=""):
        raise ModuleNotFoundError("No module named 'torch'", name="torch.nn")

    monkeypatch.setattr(plugins, "load", load)
    with pytest.raises(
        MissingDependency, match=r"torch, which engine 'pytorch' needs.*pip install 'vla_spec\[torch\]'"
    ):
        config.load_plugin("engine", "pytorch")


def test_a_bug_in_a_plugin_is_not_mistaken_for_a_missing_library(monkeypatch):
    def load(kind, name, where=""):
        raise ModuleNotFoundError("No module named 'vla_spec.nothing'", name="vla_spec.nothing")

    monkeypatch.setattr(plugins, "load", load)
    with pytest.raises(ModuleNotFoundError):
        config.load_plugin("engine", "pytorch")
