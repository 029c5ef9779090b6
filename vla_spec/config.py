"""Configuration: YAML in, a frozen tree out; every error names the YAML path, the value, and the closest valid name.

One mechanism for everything: a frozen dataclass says which keys exist, their types and their defaults, once. The tree
itself, the runtime section and each plugin's ``Options`` are checked the same way.

    model: models/metaworld
    engine: onnxruntime                       # a plugin's name ...
    drafter: {name: feature_head, top_k: 4}   # ... or its name and options
    rule: greedy
    runtime: {execute_horizon: 4, deadline_ms: 60}
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from vla_spec import plugins
from vla_spec.errors import BadConfig, MissingDependency, UnknownOption, VlaSpecError
from vla_spec.realtime import RealtimeOptions

#: Keys of the tree that name a plugin. The others are plain values.
PLUGIN_KEYS = ("engine", "drafter", "rule", "controller", "robot", "adapter")
#: Named compositions: the folder is the registry.
MODES_DIR = Path(__file__).parent / "modes"
#: Where the shipped weights are.
DEFAULT_MODEL = Path("models/metaworld")
#: Library that a plugin could not import -> the extra that brings it.
EXTRA_OF_LIBRARY = {
    "onnxruntime": "run", "safetensors": "run", "torch": "torch", "onnx": "train", "metaworld": "sim", "mujoco": "sim",
    "jinja2": "report", "matplotlib": "report", "PIL": "report", "tokenizers": "openvla", "timm": "openvla",
    "zmq": "serve", "msgpack": "serve", "openvino": "openvino",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choice:
    """One plugin and its options.

    Attributes:
        name: the plugin's file name.
        options: an instance of the plugin's ``Options``.
    """

    name: str
    options: Any


@dataclass(frozen=True, slots=True)
class Runtime:
    """How chunks are asked for and played.

    Attributes:
        execute_horizon: control steps that are played before the next plan begins.
        deadline_ms: time until the chunk is due, from the observation's stamp; with clock ``lockstep`` from the start
            of planning, and nothing is cut: what took longer is counted as late. [ms]
        clock: ``real`` = physics goes on while the planner thinks, as on a robot; ``lockstep`` = physics waits for the
            planner, whose latency is still measured; ``virtual`` = latency comes from the cost table, so that results
            repeat bit for bit from a seed.
        hand_over: how a new chunk takes over from the old one.
        time_scale: simulated seconds per second with clock ``real``; 0.5 = half as fast as the robot's own time.
        is_observing_free: with clock ``real`` the simulated world stands still while its pictures are drawn: a robot's
            cameras need none of its processor. False = drawing is taken out of the plan's time.
        realtime: with clock ``real``: scheduler, cores, locked memory, garbage collection and a process of its own for
            the actor; ``{}`` asks for all by their defaults, None for nothing. What was granted is in the results.
        is_shifted_by_holds: a chunk is played from the first action that was not consumed yet: steps in which the arm
            held for want of a plan do not count. False = they do, for a world that moves by itself.
        costs: cost table of a calibration (``*.costs.json``, refused if it belongs to another engine, model or
            device) or of an earlier run (its costs.json) instead of one measured at start-up; with clock ``virtual``
            the whole run then repeats bit for bit.
        costs_load: which load's table of a calibration, such as ``idle`` or ``busy``; None = the file's only one.
        allow_other_device: take a calibration of another machine, or published figures, for real time as well; with
            clock ``virtual`` they are taken anyway.
    """

    execute_horizon: Annotated[int, Field(ge=1, le=1000)] = 4
    deadline_ms: Annotated[float, Field(gt=0, le=60_000)] = 50.0
    clock: Literal["real", "lockstep", "virtual"] = "lockstep"
    hand_over: Literal["replace", "temporal_ensemble", "frozen_prefix"] = "replace"
    time_scale: Annotated[float, Field(gt=0, le=100)] = 1.0
    is_observing_free: bool = True
    is_shifted_by_holds: bool = True
    realtime: RealtimeOptions | None = None
    costs: Path | None = None
    costs_load: str | None = None
    allow_other_device: bool = False

    def __post_init__(self) -> None:
        if self.costs_load is not None and self.costs is None:
            raise BadConfig(f"costs_load is {self.costs_load!r} without a table; valid: with runtime.costs=FILE")
        if self.realtime is not None and self.clock != "real":
            raise BadConfig(f"realtime is given with clock {self.clock}, which waits; valid: with clock real")


@dataclass(frozen=True, slots=True)
class Config:
    """The resolved configuration of one decoding mode.

    Attributes:
        mode: name in tables.
        description, source: what it is, and the publication it follows.
        model: folder with the model's files; the toy engine needs none.
        engine, drafter, rule, controller, robot: plugins.
        adapter: plugin; None = `toy` for the toy engine, else `vla`. The model's policy.json names the tokenizer.
        runtime: see `Runtime`.
        num_threads: threads inside one engine call.
        seed: for everything random in decoding.
    """

    engine: Choice
    drafter: Choice
    rule: Choice
    controller: Choice
    robot: Choice
    adapter: Choice | None = None
    mode: str = "custom"
    description: str = ""
    source: str = ""
    model: Path = DEFAULT_MODEL
    runtime: Runtime = field(default_factory=Runtime)
    num_threads: Annotated[int, Field(ge=1, le=1024)] = 1
    seed: Annotated[int, Field(ge=0)] = 0


#: Plugins that are taken when a configuration says nothing. Everything else has its default in the dataclass.
DEFAULT_PLUGINS: dict[str, str] = {
    "engine": "onnxruntime",
    "drafter": "none",
    "rule": "greedy",
    "controller": "fixed",
    "robot": "metaworld",
}


def resolve(tree: Mapping[str, Any], mode: str = "custom") -> Config:
    """A raw tree, as YAML gives it, to a checked configuration.

    Args:
        tree: keys of `Config`.
        mode: its name in tables and in messages.

    Raises:
        UnknownOption: a key or plugin that does not exist.
        BadConfig: a value of the wrong type or out of range.
        MissingDependency: a plugin whose library is not installed.
    """
    if not isinstance(tree, Mapping):
        raise BadConfig(f"configuration: expected keys and values, got {_show(tree)}")
    values: dict[str, Any] = {"mode": mode, **DEFAULT_PLUGINS, **tree}
    try:
        check_keys(values, _names(Config), "")
        for key in PLUGIN_KEYS:
            if values.get(key) is not None:
                values[key] = resolve_choice(key, values[key])
        if "runtime" in values:
            values["runtime"] = _resolve_runtime(values["runtime"])
        config: Config = build_options(Config, values, "")
    except VlaSpecError as error:
        if mode != "custom":  # which of several files it is; type and attributes of the error stay
            error.args = (f"mode {mode}: {error}",)
        raise
    return config


def _resolve_runtime(values: Any) -> Any:
    """The section ``runtime``; what lies inside it is checked under its own path."""
    if isinstance(values, Mapping) and values.get("realtime") is not None:
        asked = build_options(RealtimeOptions, values["realtime"], "runtime.realtime")
        values = {**values, "realtime": asked}
    return build_options(Runtime, values, "runtime")


def resolve_choice(kind: str, value: Any, where: str = "") -> Choice:
    """A plugin's name, or a mapping with ``name`` and options, to a checked choice.

    Args:
        kind: key of `plugins.FOLDERS`.
        value: as YAML gives it.
        where: YAML path for messages; empty = the kind itself.
    """
    where = where or kind
    if isinstance(value, Choice):
        return value
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        have = ", ".join(plugins.names(kind)) or "none"
        raise BadConfig(f"{where}: expected a name or {{name: ..., options}}, got {_show(value)}; have {have}")
    options = {key: item for key, item in value.items() if key != "name"}
    plugin = load_plugin(kind, value["name"], where)
    return Choice(plugin.name, build_options(plugin.options, options, where))


def load_plugin(kind: str, name: str, where: str = "") -> plugins.Plugin:
    """Import a plugin; a library that it needs and that is not installed is an error that says how to get it."""
    try:
        return plugins.load(kind, name, where)
    except ModuleNotFoundError as error:
        library = (error.name or "").split(".")[0]
        if library in ("", "vla_spec"):
            raise
        extra = EXTRA_OF_LIBRARY.get(library)
        fix = f"pip install 'vla_spec[{extra}]'" if extra else f"pip install {library}"
        raise MissingDependency(f"{where or kind}: {library}, which {kind} {name!r} needs,", fix) from error


def build_options(cls: type[Any], values: Any, where: str) -> Any:
    """Values to an instance of a frozen dataclass, checked.

    Args:
        cls: the dataclass; its fields are the valid keys.
        values: a mapping; None = all defaults.
        where: YAML path for messages.
    """
    if values is None:
        values = {}
    if isinstance(values, cls):
        return values
    if not isinstance(values, Mapping):
        raise BadConfig(f"{where}: expected keys and values, got {_show(values)}; have {', '.join(_names(cls))}")
    check_keys(values, _names(cls), where)
    hints = typing.get_type_hints(cls)
    # One number where a tuple is meant: `cap: 0.001`.
    full = {k: (v,) if _is_tuple(hints.get(k)) and isinstance(v, int | float) else v for k, v in values.items()}
    try:
        return TypeAdapter(cls).validate_python(full)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join([where, *map(str, first["loc"])]).strip(".")
        message = first["msg"].removeprefix("Value error, ")
        raise BadConfig(f"{path or 'configuration'}: {_lower_first(message)}, got {_show(first['input'])}") from None
    except VlaSpecError as error:
        if where and not str(error).startswith(where):
            raise BadConfig(f"{where}: {error}") from None
        raise


def check_keys(values: Mapping[Any, Any], valid: list[str], where: str) -> None:
    """Raise UnknownOption for the first key that is not in ``valid``."""
    for key in values:
        if key not in valid:
            raise UnknownOption("option", key, valid, f"{where}.{key}".strip("."))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` on top of ``base``. Mappings merge key by key, except that another plugin name drops the old options."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if key in PLUGIN_KEYS:
            old = {"name": old} if isinstance(old, str) else old
            if isinstance(value, Mapping) and isinstance(old, Mapping):
                is_same = value.get("name", old.get("name")) == old.get("name")
                merged[key] = {**old, **value} if is_same else dict(value)
                continue
        elif isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[key] = merge(old, value)
            continue
        merged[key] = value
    return merged


def read_tree(path: Path) -> dict[str, Any]:
    """A YAML file as plain dictionaries.

    Raises:
        BadConfig: missing, unreadable, not YAML, or not keys and values.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path}: can't be read ({type(error).__name__}); expected a YAML file") from error
    except yaml.YAMLError as error:
        at = getattr(error, "problem_mark", None)
        line = f" line {at.line + 1}" if at is not None else ""
        raise BadConfig(f"{path}{line}: not valid YAML ({str(error).splitlines()[0]})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise BadConfig(f"{path}: expected keys and values, got {_show(tree)}")
    return tree


def mode_names() -> list[str]:
    """Names of the shipped decoding modes, sorted."""
    return sorted(path.stem for path in MODES_DIR.glob("*.yaml"))


def read_mode(name: str) -> tuple[str, dict[str, Any]]:
    """A shipped mode by name, or a mode in a file of one's own (a path that ends in .yaml). Returns name and tree."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        return path.stem, read_tree(path)
    if name not in mode_names():
        raise UnknownOption("mode", name, mode_names(), "modes")
    return name, read_tree(MODES_DIR / f"{name}.yaml")


def set_key(tree: dict[str, Any], assignment: str) -> dict[str, Any]:
    """``drafter.top_k=4`` as a change of the tree; values are read as YAML. Returns a new tree.

    Raises:
        BadConfig: not of that form.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise BadConfig(f"--set {assignment!r}: expected KEY=VALUE, as in drafter.top_k=4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadConfig(f"--set {assignment!r}: the value is not valid YAML") from error
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict), f"{keys=}"
    return merge(tree, value)


def as_tree(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain values; `resolve` takes it back."""
    tree: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if isinstance(value, Choice):
            value = {"name": value.name, **as_options(value.options)}
        elif isinstance(value, Path):
            value = str(value)
        elif dataclasses.is_dataclass(value):
            value = as_options(value)
        if value is not None:
            tree[item.name] = value
    return tree


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    text: str = yaml.safe_dump(as_tree(config), sort_keys=False)
    return text


def find_model(path: Path) -> Path:
    """A model folder: as given, or else beside the package, so that the shipped weights are found from anywhere."""
    beside = Path(os.path.realpath(__file__)).parent.parent / path
    return path if path.is_absolute() or path.exists() or not beside.exists() else beside


def as_options(options: Any) -> dict[str, Any]:
    """A plugin's options as plain values."""
    values: dict[str, Any] = json.loads(TypeAdapter(type(options)).dump_json(options))
    return values


def _names(cls: type[Any]) -> list[str]:
    return [item.name for item in dataclasses.fields(cls)]


def _is_tuple(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_is_tuple(part) for part in typing.get_args(hint))
    return typing.get_origin(hint) is tuple


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
