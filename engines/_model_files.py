"""The files of one exported model: policy.json (the adapter's), engine.json, safetensors, ONNX graphs, golden inputs.

A model folder holds data only. ``target.safetensors`` keeps the weights once, in half precision; the ONNX graphs point
into it (external data), so every engine reads the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vla_spec.errors import BadModel

WEIGHTS = "target.safetensors"
SIZES = "engine.json"
SIZE_NAMES = (
    "num_layers", "num_heads", "head_width", "capacity", "prompt_length", "feature_width", "vocab_size",
)  # fmt: skip


def require_model_dir(path: Path | None) -> Path:
    """The folder, if it holds a model.

    Raises:
        BadModel: no folder, or files are missing; names them.
    """
    if path is None:
        raise BadModel("this engine needs a model folder; set `model:` in the configuration")
    missing = [name for name in ("policy.json", SIZES, WEIGHTS) if not (path / name).is_file()]
    if missing:
        raise BadModel(f"{path}: {' and '.join(missing)} missing; `vla-spec export` writes a model folder")
    return path


def read_sizes(path: Path) -> dict[str, Any]:
    """What engine.json says: the numbers of `SIZE_NAMES`, and weights_sha256.

    Raises:
        BadModel: missing or not what export writes.
    """
    file = require_model_dir(path) / SIZES
    try:
        sizes: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for name in SIZE_NAMES:
            if not isinstance(sizes[name], int):
                raise TypeError(f"{name} is {sizes[name]!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise BadModel(f"{file}: not an engine description ({error!r}); export the model again") from error
    return sizes


def hash_weights(path: Path) -> str:
    """sha256 of the weights file, hex."""
    digest = hashlib.sha256()
    with (path / WEIGHTS).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_weights(path: Path) -> str:
    """sha256 of the weights, compared with what export wrote down.

    Raises:
        BadModel: the file changed since.
    """
    expected, found = read_sizes(path).get("weights_sha256"), hash_weights(path)
    if expected != found:
        raise BadModel(
            f"{path / WEIGHTS}: corrupt or of another model (sha256 {found[:12]}…, engine.json says "
            f"{str(expected)[:12]}…)"
        )
    return found
