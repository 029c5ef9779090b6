"""An engine around another one: all that a wrapper does not change is the wrapped engine's."""

from __future__ import annotations

from vla_spec.interfaces import Engine, EngineInfo
from vla_spec.types import EngineInputs, Int32, Scores


class WrappedEngine:
    """Passes everything on. Override what differs."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def info(self) -> EngineInfo:
        """The wrapped engine's."""
        return self.engine.info

    @property
    def length(self) -> int:
        """The wrapped engine's."""
        return self.engine.length

    @property
    def max_step(self) -> int:
        """The wrapped engine's."""
        return self.engine.max_step

    @property
    def features(self) -> object | None:
        """The wrapped engine's."""
        return self.engine.features

    def prefill(self, inputs: EngineInputs) -> Scores:
        """The wrapped engine's."""
        return self.engine.prefill(inputs)

    def step(self, tokens: Int32, parents: Int32) -> Scores:
        """The wrapped engine's."""
        return self.engine.step(tokens, parents)

    def commit(self, path: Int32) -> None:
        """The wrapped engine's."""
        self.engine.commit(path)
