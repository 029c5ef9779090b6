"""From a model folder to a compiled engine in the cache: prepare every graph, choose profiles, build, check."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vla_spec.engines import cache
from vla_spec.engines._model_files import ModelFiles
from vla_spec.engines._quantized_files import quantized_graph
from vla_spec.engines._trt import builder, inspection, profiles
from vla_spec.engines._trt.builder import BuilderOptions, Prepared
from vla_spec.engines._trt.library import Library, open_library
from vla_spec.engines._trt.profiles import Profile
from vla_spec.errors import BadConfig
from vla_spec.progress import Reporter

#: Where the sources lie whose change makes other engines: they are part of the key.
SOURCES = ("half_precision.py", "profiles.py", "builder.py", "inspection.py")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What to build.

    Attributes:
        backend: "tensorrt-rtx" (ahead of time, anywhere) or "tensorrt" (on the device).
        precision: "fp16", "bf16", or "int8" or "fp8": what was quantised to it, the rest in fp16.
        tiers: sizes of decoder calls; None = `default_tiers`.
        builder: devices and limits.
    """

    backend: str = "tensorrt-rtx"
    precision: str = "fp16"
    tiers: tuple[int, ...] | None = None
    builder: BuilderOptions = field(default_factory=BuilderOptions)

    def __post_init__(self) -> None:
        if self.precision not in builder.PRECISIONS:
            raise BadConfig(f"precision {self.precision!r}; valid: {', '.join(builder.PRECISIONS)}")


def build_engine(
    model_dir: Path, options: BuildOptions, progress: Reporter, cache_dir: Path | None = None, device: Any = None
) -> cache.BuiltEngine:
    """Build the engine of a model folder, or find it in the cache.

    Args:
        model_dir: the folder; `small/` inside it is a model of its own.
        options: see `BuildOptions`.
        progress: told about each graph.
        cache_dir: see `cache.default_cache_dir`.
        device: `vla_spec.engines._trt.cuda.Device` to build on, where the library can't build ahead.

    Raises:
        BadConfig: devices, tiers or profiles that can't be.
        BadModel: a graph that is missing, malformed or not what was asked for; what the library said.
        BadEngine: the cache can't be written.
        MissingDependency: no such library here.
    """
    library = open_library(options.backend)
    builder.check_capabilities(library, options.builder.capabilities)
    if not library.builds_ahead and device is None:
        raise BadConfig(
            f"backend {options.backend} builds on the device only; valid: run it on the machine with the GPU"
        )
    files = ModelFiles.open(model_dir)
    tiers = profiles.check_tiers(options.tiers or profiles.default_tiers(files), files)
    prepared = prepare_all(model_dir, options.precision)
    sizes = {name: profiles.profiles_of(name, graph.shapes, files, tiers) for name, graph in prepared.items()}
    identity = identify(model_dir, prepared, sizes, tiers, options, library, device)

    def build_all() -> Iterator[tuple[str, cache.Plan]]:
        progress.phase("building", len(prepared))
        for name, graph in prepared.items():
            yield name, build_graph(library, name, graph, sizes[name], options)
            progress.step(name)

    def is_waiting() -> None:
        progress.phase(f"another builder has {identity.key[:12]}, waiting", 1)

    return cache.get_or_build(identity, build_all, cache_dir, is_waiting)


def prepare_all(model_dir: Path, precision: str) -> dict[str, Prepared]:
    """Every graph of the folder in its precision, by the name that runtimes open it with."""
    out = {}
    for name in profiles.GRAPHS:
        file = model_dir / f"{name}.onnx"
        if precision in builder.QUANTISED:
            file = quantized_graph(file, precision, is_needed=name == "decoder")
        if name in profiles.REQUIRED or file.is_file():
            out[name] = builder.prepare(file, precision)
    return out


def build_graph(
    library: Library, name: str, graph: Prepared, sizes: Sequence[Profile], options: BuildOptions
) -> cache.Plan:  # fmt: skip
    """Build one graph and refuse it if it is not in the precision that was asked for."""
    built = builder.build(library, graph, sizes, options.builder)
    is_quantised = graph.source.stem != name
    precision = options.precision if is_quantised else builder.FLOAT_OF[options.precision]
    inspection.check_summary(name, built.summary, precision, graph.caches, graph.attentions)
    return cache.Plan(built.plan, built.seconds, built.is_decomposed, built.summary.to_json())


def identify(
    model_dir: Path, prepared: dict[str, Prepared], sizes: dict[str, tuple[Profile, ...]], tiers: tuple[int, ...],
    options: BuildOptions, library: Library, device: Any = None,
) -> cache.Identity:  # fmt: skip
    """Everything that the result depends on."""
    hashes = cache.hash_model(model_dir, [graph.source.stem for graph in prepared.values()])
    quantised = {name: value for name, value in hashes.items() if f".{options.precision}." in name}
    own = {key: value for key, value in asdict(options.builder).items() if key != "capabilities"}
    return cache.Identity(
        files=hashes,
        precision=options.precision,
        tiers=tiers,
        profiles={
            name: [{d: list(size) for d, size in profile.items()} for profile in all_sizes]
            for name, all_sizes in sizes.items()
        },
        quantisation=cache.hash_json(quantised) if quantised else None,
        library={"name": library.backend, "version": library.version},
        device={"sm": sorted(options.builder.capabilities)} if device is None else cache.device_identity(device),
        options=own,
        code=cache.hash_sources(Path(builder.__file__).parent / name for name in SOURCES),
    )
