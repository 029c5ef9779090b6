"""A quantised graph's files: the graph, its weights, and a manifest that says which model they were made from.

``decoder.onnx`` in int8 is ``decoder.int8.onnx``, ``decoder.int8.safetensors`` and ``decoder.int8.json``. The manifest
is written last and removed first, so files that don't belong together are never taken for a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vla_spec.atomic import replacing
from vla_spec.engines._digest import sha256_of
from vla_spec.engines._model_files import ModelFiles
from vla_spec.errors import BadModel

FORMAT = 1


def names_of(graph: Path, precision: str) -> tuple[Path, Path, Path]:
    """Quantised graph, its weights, and its manifest, beside a graph of a model folder."""
    stem = f"{graph.stem}.{precision}"
    return graph.with_name(f"{stem}.onnx"), graph.with_name(f"{stem}.safetensors"), graph.with_name(f"{stem}.json")


def quantized_graph(graph: Path, precision: str, is_needed: bool) -> Path:
    """What a runtime of this precision opens in place of a graph.

    Args:
        graph: as exported, ``decoder.onnx`` for one.
        precision: of the quantised one, "int8".
        is_needed: False = the graph itself is the answer if it was not quantised.

    Raises:
        BadModel: not there and needed; made from another model; incomplete or changed.
    """
    quantized, _, manifest = names_of(graph, precision)
    if not manifest.is_file():
        if not is_needed and not quantized.exists():
            return graph
        raise BadModel(f"{manifest}: missing; `vla-spec quantize {graph.parent}` writes the graph and this")
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
        model, source, files = values["weights_sha256"], values["graph_sha256"], dict(values["files"])
        if values["format"] != FORMAT or {quantized.name} - set(files):
            raise ValueError(f"format {values['format']!r} for {sorted(files)}; valid: {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadModel(f"{manifest}: not a quantised graph's manifest ({error!r}); quantise the model again") from error
    if model != ModelFiles.describe(graph.parent).weights_sha256 or source != hash_file(graph):
        raise BadModel(f"{quantized}: made from another {graph.name} or other weights; quantise the model again")
    for name, sha256 in files.items():
        if hash_file(graph.with_name(Path(name).name)) != sha256:
            raise BadModel(f"{graph.with_name(Path(name).name)}: missing, cut off or changed; quantise the model again")
    return quantized


def write_manifest(graph: Path, precision: str, about: dict[str, Any]) -> None:
    """Say that the quantised files beside this graph are whole."""
    quantized, weights, manifest = names_of(graph, precision)
    files = {path.name: hash_file(path) for path in (quantized, weights)}
    values = {
        "format": FORMAT,
        "weights_sha256": ModelFiles.describe(graph.parent).weights_sha256,
        "graph_sha256": hash_file(graph),
        "files": files,
        **about,
    }
    with replacing(manifest) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def hash_file(path: Path) -> str | None:
    """sha256 of a file, hex; None if there is none."""
    try:
        return sha256_of(path)
    except OSError:
        return None
