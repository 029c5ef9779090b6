"""What engines around a `KVCache` have in common. Abstract: how to prefill and to step is the engine's own business."""

from __future__ import annotations

from vla_spec.engines._kv_cache import KVCache
from vla_spec.interfaces import EngineInfo
from vla_spec.types import Float32, Int32


class CachedEngine:
    """The part of `Engine` that is the cache's. A subclass sets both attributes and adds ``prefill`` and ``step``."""

    _cache: KVCache
    _info: EngineInfo

    @property
    def info(self) -> EngineInfo:
        """Identity and capabilities."""
        return self._info

    @property
    def length(self) -> int:
        """Committed cache rows, prompt included."""
        return self._cache.length

    @property
    def max_step(self) -> int:
        """Most tokens that one `step` takes."""
        return self._cache.max_step

    @property
    def features(self) -> Float32:
        """float32 [length, D], valid until the next `prefill`."""
        return self._cache.features[: self._cache.length]

    def commit(self, path: Int32) -> None:
        """Keep these nodes of the last step."""
        self._cache.commit(path)
