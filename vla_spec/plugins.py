"""The folder is the registry: ``drafter: ngram`` is the file ``drafters/ngram.py``. Nothing else has to be edited.

A plugin module has two names: ``Options``, a frozen dataclass whose fields are what a configuration may set, and
``build(options, parts)``, which makes the object. Files that start with an underscore are not plugins. Heavy imports
belong inside the plugin's own file (or inside ``build``), so that listing names imports nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vla_spec.costs import Costs
from vla_spec.errors import UnknownOption
from vla_spec.interfaces import ActionTokenizer, Engine
from vla_spec.types import TokenDomain

#: Kind -> folder inside the package.
FOLDERS = {
    "engine": "engines",
    "drafter": "drafters",
    "rule": "acceptance",
    "controller": "controllers",
    "tokenizer": "tokenizers",
    "adapter": "adapters",
    "robot": "robots",
    "fault": "faults",
}
#: Modules in these folders that are tools and not plugins.
NOT_PLUGINS = {"engines": {"export", "nets", "graphs", "build", "verify", "cache"}}


@dataclass(frozen=True, slots=True)
class Parts:
    """What a plugin may be built from. Built in this order: tokenizer and adapter, engine, rule, drafter, controller.

    Attributes:
        model_dir: folder with the model's files, None for the toy engine.
        domain: what the tokens of one chunk mean.
        tokenizer: how tokens become actions.
        target: the target engine (rules, drafters and controllers only).
        costs: what calls of the target and of the drafter cost (controllers only), or None.
        num_threads: intra-op threads for engines and drafter models.
        seed: for everything random.
    """

    domain: TokenDomain
    tokenizer: ActionTokenizer
    model_dir: Path | None = None
    target: Engine | None = None
    costs: Costs | None = None
    num_threads: int = 1
    seed: int = 0


class Plugin(NamedTuple):
    """One loaded plugin module."""

    kind: str
    name: str
    options: type[Any]
    build: Callable[[Any, Parts], Any]


def names(kind: str) -> list[str]:
    """Names of all plugins of a kind, sorted; imports nothing."""
    folder = FOLDERS[kind]
    path = Path(__file__).parent / folder
    skip = NOT_PLUGINS.get(folder, set())
    found = {file.stem for file in path.glob("*.py")} | {file.parent.name for file in path.glob("*/__init__.py")}
    return sorted(name for name in found if not name.startswith("_") and name not in skip)


def load(kind: str, name: str, where: str = "") -> Plugin:
    """Import one plugin.

    Raises:
        UnknownOption: no such file; the message lists the names and the closest.
    """
    if name not in names(kind):
        raise UnknownOption(kind, name, names(kind), where)
    module = importlib.import_module(f"vla_spec.{FOLDERS[kind]}.{name}")
    return Plugin(kind, name, module.Options, module.build)
