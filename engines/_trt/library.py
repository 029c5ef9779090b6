"""The TensorRT library behind one name: ``tensorrt`` (full, on the robot) or ``tensorrt_rtx`` (builds without a GPU).

Both speak the same API as far as it is used here; everything that only one of them has is asked for in this file, by
looking for the attribute. Neither is imported before an engine is built or loaded.

Source of the semantics: TensorRT 10 and TensorRT-RTX 1.x Python API references; platform notes in docs/engines.md.
"""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass
from typing import Any, Literal

from vla_spec.errors import BadConfig, MissingDependency

Backend = Literal["tensorrt", "tensorrt-rtx"]
#: Backend -> module, and how to get it.
MODULES: dict[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
INSTALL: dict[str, str] = {
    "tensorrt": "JetPack's own TensorRT on a Jetson, else pip install tensorrt on the machine with the GPU",
    "tensorrt-rtx": "pip install 'vla_spec[tensorrt-rtx]'",
}
#: Without these it is a stub (an empty namespace package imports without an error) or too old for the decoder graph.
NEEDED = (
    "Builder", "OnnxParser", "Runtime", "ILogger", "BuilderFlag", "LayerType.ATTENTION_INPUT",
    "LayerType.KV_CACHE_UPDATE", "INetworkDefinition.add_attention",
)  # fmt: skip
#: Most messages of the library that are kept, the newest.
_KEPT = 50


@dataclass(frozen=True, slots=True)
class Library:
    """An imported library.

    Attributes:
        backend: "tensorrt" or "tensorrt-rtx".
        version: as the library says.
        module: the library.
        log: its logger; the library wants one object for the whole process, and to find it alive.
    """

    backend: str
    version: str
    module: Any
    log: Any

    @property
    def builds_ahead(self) -> bool:
        """It builds for devices that are not here."""
        return hasattr(self.module, "ComputeCapability")

    @property
    def capabilities(self) -> tuple[int, ...]:
        """Compute capabilities that it builds ahead of time for, 89 for 8.9; empty = for the present device only."""
        if not self.builds_ahead:
            return ()
        names = [name for name in dir(self.module.ComputeCapability) if name.startswith("SM")]
        return tuple(sorted(int(name.removeprefix("SM")) for name in names))

    def messages(self) -> str:
        """What the library complained about since the last call, in one line."""
        return self.log.take()


_opened: dict[str, Library] = {}
_lock = threading.Lock()


def open_library(backend: str) -> Library:
    """Import a library, once per process.

    Raises:
        BadConfig: no such backend.
        MissingDependency: not installed, or only a stub of it, or older than the decoder graph needs.
    """
    if backend not in MODULES:
        raise BadConfig(f"backend {backend!r}; valid: {', '.join(MODULES)}")
    with _lock:
        if backend not in _opened:
            _opened[backend] = _open(backend, MODULES[backend])
        return _opened[backend]


def _open(backend: str, name: str) -> Library:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a library of it is not there
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({str(error).splitlines()[0][:200]})"
        raise MissingDependency(f"the library {name}{reason}", INSTALL[backend]) from error
    missing = [path for path in NEEDED if not _has(module, path)]
    version = getattr(module, "__version__", None)
    if missing or version is None:
        found = f"version {version}" if version else "a stub without content"
        raise MissingDependency(
            f"{name} with {', '.join(missing) or 'a version'} (found {found}), which the decoder graph needs,",
            INSTALL[backend],
        )
    return Library(backend, str(version), module, _logger(module))


def _has(module: Any, path: str) -> bool:
    value = module
    for part in path.split("."):
        value = getattr(value, part, None)
        if value is None:
            return False
    return True


def _logger(module: Any) -> Any:
    """A logger that keeps what the library complains about: it answers failures with None and says why only there."""
    complaints = (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR)

    class Messages(module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._kept: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in complaints:
                self._kept = [*self._kept[1 - _KEPT :], message]

        def take(self) -> str:
            kept, self._kept = self._kept, []
            return " | ".join(dict.fromkeys(" ".join(text.split()) for text in kept))

    return Messages()
