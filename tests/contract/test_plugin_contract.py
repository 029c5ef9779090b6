"""Every plugin module has the two names that the registry needs; its options are frozen and have defaults."""

import dataclasses

import pytest

from contract.conftest import NEVER_SKIPPED
from vla_spec import plugins
from vla_spec.errors import MissingDependency, UnknownOption

ALL = [(kind, name) for kind in plugins.FOLDERS for name in plugins.names(kind)]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_options_are_a_frozen_dataclass_with_defaults(kind, name):
    try:
        plugin = plugins.load(kind, name)
    except (MissingDependency, ImportError) as error:
        pytest.skip(f"{kind} {name}: {error}")
    assert dataclasses.is_dataclass(plugin.options)
    assert plugin.options.__dataclass_params__.frozen
    options = plugin.options()
    for field in dataclasses.fields(options):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(options, field.name, None)
    assert callable(plugin.build)


@pytest.mark.parametrize("kind", NEVER_SKIPPED)
def test_the_folder_lists_every_plugin_that_needs_nothing(kind):
    assert set(plugins.names(kind)) >= NEVER_SKIPPED[kind]


def test_an_unknown_name_lists_the_known_ones_and_the_closest():
    with pytest.raises(UnknownOption, match=r"no rule named 'gredy'; have .*greedy.*did you mean 'greedy'\?"):
        plugins.load("rule", "gredy")


def test_modules_that_start_with_an_underscore_are_not_plugins():
    assert not [name for _, name in ALL if name.startswith("_")]
