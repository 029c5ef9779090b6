"""From a configuration to what is served: policies that share one engine, warmed up, and what clients are told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

from vla_spec.assemble import Assembler, Assembly
from vla_spec.comparison import WARMUP_PLANS, Sample, plan_sample
from vla_spec.config import Config
from vla_spec.errors import BadConfig
from vla_spec.interfaces import Adapter
from vla_spec.policy import Policy
from vla_spec.serving.wire import Sizes, Welcome
from vla_spec.types import Observation


class ExampleAdapter(Protocol):
    """An adapter that knows what a valid observation looks like."""

    def example(self) -> Observation:
        """Some observation that is valid, for warm-up."""


@dataclass(frozen=True, slots=True)
class Service:
    """Ready to be given to a `PlanServer`.

    Attributes:
        welcome: what clients are told.
        assemblies: one per client at a time; engine and costs are the same.
    """

    welcome: Welcome
    assemblies: tuple[Assembly, ...]

    @property
    def policies(self) -> tuple[Policy, ...]:
        """One per client at a time."""
        return tuple(assembly.policy for assembly in self.assemblies)


def build_service(config: Config, num_clients: int, dt_s: float, assembler: Assembler | None = None) -> Service:
    """Build one mode as often as there may be clients, each with a drafter, controller and ladder of its own.

    Args:
        config: resolved; its robot is not built, and its clock must be a real one.
        num_clients: places.
        dt_s: control period that the model was made for [s].
        assembler: shares engines with others; None = a new one.

    Raises:
        VlaSpecError: a part can't be built, or the adapter does not say what an observation looks like.
    """
    if config.runtime.clock == "virtual":
        raise BadConfig("runtime.clock is virtual; valid for a server: real, its clients' deadlines are")
    if num_clients < 1:
        raise BadConfig(f"--max-clients {num_clients}; valid: 1 or more")
    assembler = assembler or Assembler()
    adapter = assembler.adapter(config)
    example = _example(adapter)
    first = assembler.assemble(config, example)
    others = (assembler.assemble(config, example, first.costs) for _ in range(num_clients - 1))
    assemblies = (first, *others)
    for assembly in assemblies:
        for _ in range(WARMUP_PLANS):
            plan_sample(assembly, Sample(example, None))
        assembly.policy.reset()
    return Service(welcome_of(first, example, dt_s), assemblies)


def welcome_of(assembly: Assembly, example: Observation, dt_s: float) -> Welcome:
    """What clients are told about one mode.

    Args:
        assembly: the mode.
        example: a valid observation, for its sizes.
        dt_s: control period that the model was made for [s].
    """
    config, info, domain = assembly.config, assembly.engine.info, assembly.domain
    return Welcome(
        mode=config.mode,
        engine=config.engine.name,
        drafter=config.drafter.name,
        rule=config.rule.name,
        controller=config.controller.name,
        precision=info.precision,
        is_exact=assembly.rule.exact and info.is_batch_invariant,
        model_hash=info.model_hash,
        dt_s=dt_s,
        sizes=Sizes(
            image_shape=cast(tuple[int, int, int, int], example.images.shape),
            state_size=len(example.state),
            horizon=assembly.policy.horizon,
            action_size=assembly.policy.space.size,
            num_tokens=domain.num_tokens,
            tokens_per_step=domain.tokens_per_step,
            vocab_size=domain.vocab_size,
        ),
        space=assembly.policy.space,
        costs=assembly.costs,
    )


def _example(adapter: Adapter) -> Observation:
    if not callable(getattr(adapter, "example", None)):
        raise BadConfig(f"adapter {type(adapter).__name__} has no example(), which says what a request looks like")
    return cast(ExampleAdapter, adapter).example()
