"""`vla-spec build`: compile a model folder with TensorRT, or look after what was compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vla_spec.commands._options import split
from vla_spec.errors import BadConfig

MB = 1e6
ModelArgument = Annotated[Path | None, typer.Argument(help="Model folder, as `vla-spec export` writes it.")]
Backend = Annotated[
    str, typer.Option(help="tensorrt-rtx: ahead of time, on any machine. tensorrt: for the GPU that is here.")
]
Precision = Annotated[str, typer.Option(help="fp16, bf16, or int8, fp8 (what was quantised to it; the rest in fp16).")]
Sm = Annotated[
    str | None, typer.Option("--sm", help="Compute capabilities to build ahead for, comma-separated: 89 = 8.9.")
]
Tiers = Annotated[
    str | None,
    typer.Option(help="Sizes of decoder calls, comma-separated; others are padded up. Default: chosen for the model."),
]
Workspace = Annotated[int | None, typer.Option(min=1, help="Most scratch memory of a kernel. [MiB]")]
Level = Annotated[int | None, typer.Option(min=0, max=5, help="How long the builder searches: 0 to 5.")]
Cache = Annotated[
    Path | None, typer.Option(help="Folder of compiled engines. Default: $VLA_SPEC_CACHE or the user's cache folder.")
]
ListThem = Annotated[bool, typer.Option("--list", help="Only show what is in the cache.")]
Clean = Annotated[bool, typer.Option("--clean", help="Only remove engines: of this model, or all if none is named.")]


def command(
    model: ModelArgument = None,
    backend: Backend = "tensorrt-rtx",
    precision: Precision = "fp16",
    sm: Sm = None,
    tiers: Tiers = None,
    workspace_mib: Workspace = None,
    optimization_level: Level = None,
    cache: Cache = None,
    list_: ListThem = False,
    clean: Clean = False,
) -> None:
    """Compile the graphs of a model folder into a cached engine; ends with its manifest.json."""
    if list_ and clean:
        raise BadConfig("--list and --clean exclude each other")
    if list_ or clean:
        (_show if list_ else _clean)(cache, _folder(model) if model else None)
        return
    if model is None:
        raise BadConfig("which model? name its folder: vla-spec build DIR")
    from vla_spec.engines._model_manifest import check_manifest
    from vla_spec.engines._trt.builder import BuilderOptions
    from vla_spec.engines.build import BuildOptions, build_engine
    from vla_spec.progress import LiveProgress

    options = BuildOptions(
        backend,
        precision,
        _numbers(tiers, "--tiers"),
        BuilderOptions(
            _numbers(sm, "--sm") or (), None if workspace_mib is None else workspace_mib << 20, optimization_level
        ),
    )
    folder = _folder(model)
    check_manifest(folder)
    # A small drafter model is a model folder of its own, and an engine of its own.
    for one in (folder, folder / "small"):
        if one == folder or (one / "engine.json").is_file():
            with LiveProgress() as progress:
                engine = build_engine(one, options, progress, cache, _device(backend))
            _print(engine, one)


def _folder(model: Path) -> Path:
    from vla_spec.config import find_model

    return find_model(model)


def _device(backend: str) -> Any:
    """The GPU that is here, for a library that builds for nothing else."""
    if backend != "tensorrt":
        return None
    from vla_spec.engines._trt.cuda import CudaBindings
    from vla_spec.engines._trt.library import open_library

    open_library(backend)  # what is missing is said before the device is looked for
    return CudaBindings().device(0)


def _numbers(text: str | None, where: str) -> tuple[int, ...] | None:
    names = split(text)
    if names is None:
        return None
    if not all(name.isdecimal() for name in names):
        raise BadConfig(f"{where} {text!r}: expected numbers, comma-separated, as in 86,89")
    return tuple(int(name) for name in names)


def _print(engine: Any, model: Path) -> None:
    table = Table(box=SIMPLE_HEAD, title=f"{model} in {engine.precision}, {engine.library}", title_justify="left")
    for name in ("graph", "profiles", "MB", "s", "layers"):
        table.add_column(name, justify="left" if name in ("graph", "layers") else "right")
    for name, entry in engine.graphs.items():
        table.add_row(
            name,
            str(len(engine.identity.profiles[name])),
            f"{entry.size / MB:.1f}",
            f"{entry.build_seconds:.1f}",
            _layers(entry),
        )
    console = Console()
    console.print(table)
    where = "found in the cache" if engine.was_cached else f"built in {engine.build_seconds:.1f} s"
    sm = ", ".join(f"SM{number}" for number in engine.identity.device["sm"])
    console.print(f"{where}: {sm}, {engine.size / MB:.1f} MB, tiers {_joined(engine.tiers)}", highlight=False)
    typer.echo(engine.folder / "manifest.json")


def _layers(entry: Any) -> str:
    """Heavy layers by precision, as the network has them."""
    counts: dict[str, int] = {}
    for kinds in entry.summary["precisions"].values():
        for precision, count in kinds.items():
            counts[precision] = counts.get(precision, 0) + count
    words = [f"{count} in {precision}" for precision, count in counts.items()]
    if entry.summary["kv_updates"]:
        words.append(f"{entry.summary['kv_updates']} cache updates")
    if entry.summary["attentions"]:
        words.append(f"{entry.summary['attentions']} attentions{' (may be decomposed)' if entry.is_decomposed else ''}")
    return ", ".join(words)


def _show(cache: Path | None, model: Path | None) -> None:
    from vla_spec.engines.cache import default_cache_dir, read_all

    folder = cache or default_cache_dir()
    engines, broken = read_all(folder)
    if model is not None:
        from vla_spec.engines._model_files import WEIGHTS, ModelFiles

        weights = ModelFiles.describe(model).weights_sha256
        engines = [engine for engine in engines if engine.identity.files[WEIGHTS] == weights]
    table = Table(box=SIMPLE_HEAD, title=str(folder), title_justify="left")
    for name in ("key", "built", "library", "precision", "sm", "MB"):
        table.add_column(name, justify="right" if name == "MB" else "left", no_wrap=True)
    for engine in sorted(engines, key=lambda engine: engine.created):
        library = engine.identity.library
        table.add_row(
            engine.key[:12], engine.created[:16], f"{library['name']} {library['version']}", engine.precision,
            _joined(engine.identity.device["sm"]), f"{engine.size / MB:.1f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    total = sum(engine.size for engine in engines) / MB
    console.print(f"{len(engines)} engines, {total:.1f} MB", highlight=False)
    for name in broken:
        console.print(f"damaged: {name}", highlight=False)


def _clean(cache: Path | None, model: Path | None) -> None:
    from vla_spec.engines.cache import clean

    removed = clean(cache, model)
    for path in removed:
        typer.echo(f"removed {path}")
    typer.echo(f"{len(removed)} removed")


def _joined(numbers: Any) -> str:
    return ",".join(map(str, numbers))
