"""Compiled engines on disk: a folder per key, a manifest beside the plans, whole or not there.

``<cache>/<key>/manifest.json`` says what was built from what, with what and for what (`Identity`); the key is the
sha256 of exactly that. Plans stand beside it, ``<graph>.plan``. An engine is built into a folder with another name
and takes its place by one rename; builders of the same key take turns. Nothing is believed on load: key, identity,
sizes and hashes are checked again, and what does not fit is refused in one sentence. See
docs/decisions/0022-engine-cache.md.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vla_spec.engines._digest import sha256_of
from vla_spec.engines._model_files import DESCRIPTION, WEIGHTS, ModelFiles, hash_weights
from vla_spec.errors import BadEngine, MissingDependency

#: Of manifest.json and of what goes into a key.
FORMAT = 1
MANIFEST, SUFFIX = "manifest.json", ".plan"
#: Environment variable with the cache's folder.
VARIABLE = "VLA_SPEC_CACHE"
_LOCKS = ".locks"
_CHUNK = 64 << 20


def default_cache_dir() -> Path:
    """``$VLA_SPEC_CACHE``, else ``vla_spec/engines`` in the user's cache folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vla_spec" / "engines"


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that a compiled engine depends on. Two engines are the same if and only if these are equal.

    Attributes:
        files: file of the model folder -> sha256: weights, graphs, engine.json.
        precision: "fp16", "bf16", "int8".
        tiers: sizes of decoder calls, ascending.
        profiles: graph -> its optimisation profiles, as plain values.
        quantisation: sha256 of what was calibrated, None = nothing is quantised.
        library: {"name", "version"}.
        device: {"sm": [...]} of engines that are built ahead; name, memory, caches and driver as well of those that
            were built on the device.
        options: of the builder, as plain values.
        code: sha256 over the source files that make and build the graphs.
    """

    files: dict[str, str]
    precision: str
    tiers: tuple[int, ...]
    profiles: dict[str, Any]
    quantisation: str | None
    library: dict[str, str]
    device: dict[str, Any]
    options: dict[str, Any]
    code: str

    def to_json(self) -> dict[str, Any]:
        """Plain values; the key is made of them."""
        return {
            "format": FORMAT,
            "files": dict(self.files),
            "precision": self.precision,
            "tiers": list(self.tiers),
            "profiles": self.profiles,
            "quantisation": self.quantisation,
            "library": dict(self.library),
            "device": dict(self.device),
            "options": dict(self.options),
            "code": self.code,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Identity:
        """Inverse of `to_json`; raises KeyError, TypeError or ValueError for anything else."""
        rest = dict(values)
        if rest.pop("format") != FORMAT:
            raise ValueError(f"format {values['format']!r}; valid: {FORMAT}")
        return cls(**{**rest, "tiers": tuple(rest["tiers"])})

    @property
    def key(self) -> str:
        """sha256 of the canonical JSON, hex."""
        return hash_json(self.to_json())


def hash_json(values: Any) -> str:
    """sha256 of the canonical JSON of plain values, hex."""
    return hashlib.sha256(canonical(values)).hexdigest()


def canonical(values: Any) -> bytes:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal bytes."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class PlanEntry(NamedTuple):
    """One plan, as the manifest has it.

    file: its name. sha256, size: of its bytes. build_seconds: parsing and building. is_decomposed: see `Built`.
    summary: layers and their precisions.
    """

    file: str
    sha256: str
    size: int
    build_seconds: float
    is_decomposed: bool
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine in the cache whose manifest was checked.

    Attributes:
        folder: where it lies.
        identity: what it is.
        graphs: stem of the ONNX file -> plan.
        created: when, ISO 8601.
        was_cached: it was there already.
    """

    folder: Path
    identity: Identity
    graphs: dict[str, PlanEntry]
    created: str
    was_cached: bool = field(default=True, compare=False)

    @property
    def key(self) -> str:
        """The cache key; also the folder's name."""
        return self.folder.name

    @property
    def precision(self) -> str:
        """As asked for when it was built."""
        return self.identity.precision

    @property
    def tiers(self) -> tuple[int, ...]:
        """Sizes of decoder calls; profile i of the decoder is for tiers[i]."""
        return self.identity.tiers

    @property
    def library(self) -> str:
        """Backend: "tensorrt" or "tensorrt-rtx"."""
        return self.identity.library["name"]

    @property
    def size(self) -> int:
        """Bytes of all plans."""
        return sum(entry.size for entry in self.graphs.values())

    @property
    def build_seconds(self) -> float:
        """Time that all its builds took."""
        return sum(entry.build_seconds for entry in self.graphs.values())

    def plan_file(self, graph: str) -> Path:
        """Path of a plan; not read yet.

        Raises:
            BadEngine: the engine has no such graph.
        """
        if graph not in self.graphs:
            raise BadEngine(
                f"{self.folder}: has no {graph}; has {', '.join(self.graphs)}; build again with `vla-spec build`"
            )
        return self.folder / self.graphs[graph].file

    def read_plan(self, graph: str) -> bytes:
        """The plan's bytes, checked as they are read.

        Raises:
            BadEngine: no such graph, or the file is missing, cut off or changed.
        """
        path, entry = self.plan_file(graph), self.graphs[graph]
        try:
            plan = path.read_bytes()
        except OSError as error:
            raise BadEngine(f"{path}: can't be read ({error.strerror}); {_REBUILD}") from error
        if len(plan) != entry.size:
            raise BadEngine(f"{path}: cut off or of another build, {len(plan)} bytes of {entry.size}; {_REBUILD}")
        if hashlib.sha256(plan).hexdigest() != entry.sha256:
            raise BadEngine(f"{path}: corrupt, its sha256 is not the manifest's; {_REBUILD}")
        return plan

    def to_json(self) -> dict[str, Any]:
        """manifest.json."""
        return {
            "format": FORMAT,
            "key": self.key,
            "created": self.created,
            "identity": self.identity.to_json(),
            "graphs": {name: entry._asdict() for name, entry in self.graphs.items()},
        }


_REBUILD = "`vla-spec build` makes it anew"


class Plan(NamedTuple):
    """What a builder hands over for one graph. content: anything with a buffer."""

    content: Any
    build_seconds: float
    is_decomposed: bool
    summary: dict[str, Any]


class Wanted(NamedTuple):
    """What a runtime can use.

    backend, version: of the library that is going to load it. sm: compute capability of the device, 89 = 8.9.
    device: what `device_identity` says of the device, for engines that were built on it; None = built ahead is enough.
    tiers: None = any.
    """

    backend: str
    version: str
    precision: str
    sm: int
    device: dict[str, Any] | None = None
    tiers: tuple[int, ...] | None = None


def device_identity(device: Any) -> dict[str, Any]:
    """What a device is, for the key of engines that were built on it.

    Args:
        device: `vla_spec.engines._trt.cuda.Device`.
    """
    return {
        "sm": [device.sm],
        "name": device.name,
        "memory_bytes": device.memory_bytes,
        "num_multiprocessors": device.num_multiprocessors,
        "l2_bytes": device.l2_bytes,
        "bus_width_bits": device.bus_width_bits,
        "has_ecc": device.has_ecc,
        "is_integrated": device.is_integrated,
        "driver": device.driver,
        "cuda": device.runtime,
    }


def hash_file(path: Path) -> str:
    """sha256 of a file, hex.

    Raises:
        BadEngine: it can't be read.
    """
    try:
        return sha256_of(path)
    except OSError as error:
        raise BadEngine(f"{path}: can't be read ({error.strerror})") from error


def hash_model(model_dir: Path, graphs: Iterable[str]) -> dict[str, str]:
    """File -> sha256 of everything in a model folder that these graphs are built from.

    Args:
        model_dir: the folder.
        graphs: stems of ONNX files; a ``.safetensors`` file of the same name belongs to each, and to ``decoder.int8``
            that of ``decoder`` as well.
    """
    found = {DESCRIPTION: hash_file(model_dir / DESCRIPTION), WEIGHTS: hash_weights(model_dir)}
    for graph in graphs:
        weights = dict.fromkeys(f"{stem}.safetensors" for stem in (graph, graph.partition(".")[0]))
        for name in (f"{graph}.onnx", *weights):
            if name.endswith(".onnx") or (model_dir / name).is_file():
                found[name] = hash_file(model_dir / name)
    return found


def hash_sources(paths: Iterable[Path]) -> str:
    """One sha256 over source files, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def load(model_dir: Path, wanted: Wanted, cache_dir: Path | None = None) -> BuiltEngine:
    """Find the newest engine of this model that the runtime can use.

    Of the weights it believes what engine.json says, which is hashed itself: `GraphEngine` hashes them when it opens
    the folder, and hashing gigabytes twice would be most of the loading time.

    Raises:
        BadEngine: there is none (the message names the nearest and what it differs in), or it is damaged.
    """
    cache = cache_dir or default_cache_dir()
    engines, broken = read_all(cache)
    hashes: dict[str, str] = {}
    reasons = []
    for engine in sorted(engines, key=lambda engine: engine.created, reverse=True):
        difference = _differs(engine, wanted) or _model_differs(engine, model_dir, hashes)
        if difference is None:
            check_files(engine)
            return engine
        reasons.append(difference)
    sm = f" --sm {wanted.sm}" if wanted.device is None else ""
    nearest = min(reasons, key=lambda difference: difference[0], default=None)
    found = f"the nearest of {len(reasons)}: {nearest[1]}" if nearest else "it holds none that can be read"
    damaged = f"; damaged: {', '.join(broken)}" if broken else ""
    raise BadEngine(
        f"{cache}: no engine of {model_dir} for SM{wanted.sm} in {wanted.precision} with {wanted.backend} "
        f"{wanted.version} ({found}{damaged}); to build it: vla-spec build {model_dir} --backend {wanted.backend} "
        f"--precision {wanted.precision}{sm}"
    )


def _differs(engine: BuiltEngine, wanted: Wanted) -> tuple[int, str] | None:
    """How near it came (smaller is nearer) and what it differs in; None = it does not."""
    identity = engine.identity
    name, version = identity.library["name"], identity.library["version"]
    if name != wanted.backend:
        return 6, f"built with {name}, wanted {wanted.backend}"
    if identity.precision != wanted.precision:
        return 5, f"in {identity.precision}, wanted {wanted.precision}"
    if wanted.sm not in identity.device["sm"]:
        return 4, f"for SM{', SM'.join(map(str, identity.device['sm']))}, wanted SM{wanted.sm}"
    if version != wanted.version:
        return 3, f"built with {name} {version}, wanted {wanted.version}"
    if wanted.device is not None and identity.device != wanted.device:
        both = sorted(set(identity.device) | set(wanted.device))
        names = [key for key in both if identity.device.get(key) != wanted.device.get(key)]
        return 3, f"built on another device or driver ({', '.join(names)})"
    if wanted.tiers is not None and identity.tiers != wanted.tiers:
        return 2, f"for tiers {','.join(map(str, identity.tiers))}, wanted {','.join(map(str, wanted.tiers))}"
    return None


def _model_differs(engine: BuiltEngine, model_dir: Path, known: dict[str, str]) -> tuple[int, str] | None:
    for name, wanted in engine.identity.files.items():
        if name not in known:
            if not (model_dir / name).is_file():
                return 1, f"of another model, {model_dir} has no {name}"
            declared = ModelFiles.describe(model_dir).weights_sha256 if name == WEIGHTS else None
            known[name] = declared or hash_file(model_dir / name)
        if known[name] != wanted:
            return 1, f"of another model, or {name} has changed since"
    return None


def read_all(cache: Path) -> tuple[list[BuiltEngine], list[str]]:
    """Every engine whose manifest can be believed, and the folders of the others. Plans are not read."""
    engines, broken = [], []
    for folder in sorted(cache.iterdir()) if cache.is_dir() else ():
        if not folder.is_dir() or folder.name.startswith("."):
            continue
        try:
            engines.append(read(folder))
        except BadEngine:
            broken.append(folder.name)
    return engines, broken


def read(folder: Path) -> BuiltEngine:
    """Read and check a manifest; plans are not read.

    Raises:
        BadEngine: missing, cut off, or one that contradicts itself or its folder's name.
    """
    file = folder / MANIFEST
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        identity = Identity.from_json(values["identity"])
        graphs = {name: PlanEntry(**entry) for name, entry in values["graphs"].items()}
        key, created, format_ = values["key"], str(values["created"]), values["format"]
        if any("/" in e.file or e.file.startswith(".") or not isinstance(e.size, int) for e in graphs.values()):
            raise ValueError("a plan's file is not beside it")
        if not (isinstance(identity.device["sm"], list) and identity.library["name"] and identity.library["version"]):
            raise ValueError("no device or no library")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadEngine(f"{file}: not a manifest, or cut off ({error!r}); {_REBUILD}") from error
    if not (format_ == FORMAT and key == identity.key == folder.name):
        raise BadEngine(f"{file}: does not belong to this folder, or was changed; {_REBUILD}")
    return BuiltEngine(folder, identity, graphs, created)


def check_files(engine: BuiltEngine) -> None:
    """Plans are there and have their sizes; their bytes are checked when they are read.

    Raises:
        BadEngine: one is missing or cut off.
    """
    for graph, entry in engine.graphs.items():
        path = engine.plan_file(graph)
        size = path.stat().st_size if path.is_file() else -1
        if size != entry.size:
            found = "missing" if size < 0 else f"cut off or of another build, {size} bytes of {entry.size}"
            raise BadEngine(f"{path}: {found}; {_REBUILD}")


def get_or_build(
    identity: Identity,
    build: Callable[[], Iterator[tuple[str, Plan]]],
    cache_dir: Path | None = None,
    is_waiting: Callable[[], None] = lambda: None,
) -> BuiltEngine:
    """The engine with this identity: from the cache, or built now and put there.

    Builders of the same key, also in other processes, take turns: the second finds what the first has made. What lies
    there but is damaged is built anew.

    Args:
        identity: what is wanted.
        build: yields (graph, plan), one after the other; each is written before the next is asked for.
        cache_dir: see `default_cache_dir`.
        is_waiting: called once if another builder has to be waited for.

    Raises:
        BadEngine: it can't be written (a full disk, say); nothing is left behind.
    """
    cache = cache_dir or default_cache_dir()
    folder = cache / identity.key
    with _turn(cache, identity.key, is_waiting):
        if folder.is_dir():
            with contextlib.suppress(BadEngine):
                engine = read(folder)
                for graph in engine.graphs:
                    engine.read_plan(graph)
                return engine
        _remove_leftovers(cache, identity.key)
        temporary = cache / f".{identity.key}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp"
        try:
            engine = _write(temporary, folder, identity, build)
        except OSError as error:
            raise BadEngine(
                f"{error.filename or cache}: can't be written ({error.strerror}); nothing was kept; free some space or "
                f"name another folder with --cache or ${VARIABLE}"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return engine


def _write(
    temporary: Path, folder: Path, identity: Identity, build: Callable[[], Iterator[tuple[str, Plan]]]
) -> BuiltEngine:  # fmt: skip
    temporary.mkdir(parents=True)
    graphs = {}
    for name, plan in build():
        view = memoryview(plan.content).cast("B")
        path = temporary / f"{name}{SUFFIX}"
        _write_file(path, view)
        graphs[name] = PlanEntry(
            path.name, hashlib.sha256(view).hexdigest(), view.nbytes, round(plan.build_seconds, 3), plan.is_decomposed,
            plan.summary,
        )  # fmt: skip
    created = datetime.datetime.now().astimezone().isoformat("T", "seconds")
    engine = BuiltEngine(folder, identity, graphs, created, was_cached=False)
    text = json.dumps(engine.to_json(), indent=1) + "\n"
    _write_file(temporary / MANIFEST, memoryview(text.encode()))
    _sync(temporary)
    if folder.exists():  # damaged, or it would have been returned
        trash = temporary.with_suffix(".trash")
        folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
    temporary.rename(folder)
    _sync(folder.parent)
    return engine


def _write_file(path: Path, content: memoryview) -> None:
    try:
        with path.open("wb", buffering=0) as file:
            for start in range(0, content.nbytes, _CHUNK):
                part = content[start : start + _CHUNK]
                while part.nbytes:
                    part = part[file.write(part) or 0 :]
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _sync(folder: Path) -> None:
    """Names reach the disk with their folder, where the system can do that."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _turn(cache: Path, key: str, is_waiting: Callable[[], None]) -> Iterator[None]:
    """One builder per key. The lock is the operating system's, so it ends with its process however that ends."""
    lock = _lock(cache, key)
    try:
        if not _try(lock):
            is_waiting()
            lock.acquire()
    except OSError as error:
        raise BadEngine(
            f"{cache}: can't be locked ({error.strerror or error}); name a folder that may be written with --cache or "
            f"${VARIABLE}"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _lock(cache: Path, key: str) -> Any:
    try:
        from filelock import FileLock
    except ImportError as error:
        raise MissingDependency("filelock", "pip install 'vla_spec[tensorrt-rtx]'") from error
    try:
        (cache / _LOCKS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadEngine(f"{cache}: can't be made ({error.strerror}); name another folder with --cache") from error
    return FileLock(cache / _LOCKS / f"{key}.lock")


def _try(lock: Any) -> bool:
    from filelock import Timeout

    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def _remove_leftovers(cache: Path, key: str) -> None:
    """Folders of builders of this key that died; whoever holds the lock is the only one alive."""
    for path in cache.glob(f".{key}.*"):
        shutil.rmtree(path, ignore_errors=True)


def clean(cache_dir: Path | None = None, model_dir: Path | None = None) -> list[Path]:
    """Remove engines that nobody is building: all, or those of one model; damaged and half ones always.

    Returns:
        What was removed.
    """
    cache = cache_dir or default_cache_dir()
    engines, _ = read_all(cache)
    weights = ModelFiles.describe(model_dir).weights_sha256 if model_dir is not None else None
    keep = {e.key for e in engines if weights is not None and e.identity.files[WEIGHTS] != weights}
    removed = []
    for path in sorted(cache.iterdir()) if cache.is_dir() else ():
        name = path.name.removeprefix(".").partition(".")[0]
        if not path.is_dir() or path.name == _LOCKS or name in keep or len(name) != 64:
            continue
        lock = _lock(cache, name)
        if not _try(lock):
            continue
        try:
            trash = path.with_name(f".{name}.{os.getpid()}.trash")
            path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)
            removed.append(path)
        finally:
            lock.release()
    return removed
