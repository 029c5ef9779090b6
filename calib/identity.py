"""Which engine and which drafter a configuration loads: what a cost table must belong to."""

from __future__ import annotations

from vla_spec.calib.cost_file import DrafterIdentity, EngineIdentity
from vla_spec.config import Config, as_options
from vla_spec.interfaces import Engine
from vla_spec.types import Plan


def engine_identity(config: Config, engine: Engine) -> EngineIdentity:
    """As the engine that was built from this configuration reports itself."""
    info = engine.info
    return EngineIdentity(
        name=info.name,
        model_hash=info.model_hash,
        precision=info.precision,
        provider=info.provider,
        num_threads=config.num_threads,
    )


def draft_shape(config: Config) -> Plan:
    """Shape of the trees that the mode's controller asks for: ``top_k`` and ``depth`` (0 = as long as gamma)."""
    options = as_options(config.controller.options)
    base = options.get("base")  # of a controller that leaves sizing to another one
    options = {**options, **base} if isinstance(base, dict) else options
    return Plan(gamma=0, depth=_largest(options.get("depth"), 0), top_k=_largest(options.get("top_k"), 1))


def drafter_identity(config: Config) -> DrafterIdentity:
    """The drafter with its resolved options and the shape of its trees."""
    shape = draft_shape(config)
    options = as_options(config.drafter.options)
    return DrafterIdentity(name=config.drafter.name, options=options, top_k=shape.top_k, depth=shape.depth)


def _largest(value: object, default: int) -> int:
    """An option that is a number, or several of which the largest costs most; anything else is the default."""
    if isinstance(value, list):
        return max((_largest(item, default) for item in value), default=default)
    return value if isinstance(value, int) and not isinstance(value, bool) else default
