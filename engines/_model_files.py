"""The files of one exported model: policy.json (the adapter's), engine.json, safetensors, ONNX graphs, golden inputs.

A model folder holds data only. ``target.safetensors`` keeps the weights once, in half precision; the ONNX graphs point
into it (external data), so every engine reads the same bytes. `docs/model-folder.md` says what each file holds.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vla_spec.atomic import replacing
from vla_spec.engines._decoder_spec import DecoderSpec
from vla_spec.engines._digest import sha256_of
from vla_spec.errors import BadModel
from vla_spec.types import EngineInputs

WEIGHTS = "target.safetensors"
DESCRIPTION = "engine.json"
PROMPT_GRAPH, DECODER_GRAPH, COMMIT_GRAPH = "prompt.onnx", "decoder.onnx", "commit.onnx"
GOLDEN = "golden.npz"
FORMAT = 2
_GOLDEN_NAMES = ("prefill_logits", *(f"{n}_{k}" for n in ("chain", "tree") for k in ("tokens", "parents", "logits")))


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """engine.json, read and checked.

    Attributes:
        path: the model folder.
        weights_sha256: of the weights file; the model's identity.
        decoder: what decoder.onnx was written from.
        base_rows: rows of the prompt that are always there.
        counted_input: an input of the prompt graph whose last dimension adds as many rows; None = none does.
        token_embedding: name of the tensor [V, D] that the host looks tokens up in.
        position_embedding: name of the tensor [rows, D] that is added, None where positions are rotary.
    """

    path: Path
    weights_sha256: str
    decoder: DecoderSpec
    base_rows: int
    counted_input: str | None
    token_embedding: str
    position_embedding: str | None

    @classmethod
    def open(cls, path: Path) -> ModelFiles:
        """Read engine.json and check the weights against it.

        Raises:
            BadModel: files missing, another format, or weights that changed since export.
        """
        files = cls.describe(path)
        found = hash_weights(path)
        if files.weights_sha256 != found:
            raise BadModel(
                f"{path / WEIGHTS}: corrupt or of another model (sha256 {found[:12]}…, {DESCRIPTION} says "
                f"{files.weights_sha256[:12]}…)"
            )
        return files

    @classmethod
    def describe(cls, path: Path) -> ModelFiles:
        """The same without reading the weights."""
        file = require_model_dir(path) / DESCRIPTION
        try:
            values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            found = values["format"]
            if found != FORMAT:
                raise BadModel(f"{file}: format {found!r}; valid: {FORMAT}; export the model again")
            files = cls(
                path,
                str(values["weights_sha256"]),
                DecoderSpec.from_json(values["decoder"], str(file)),
                int(values["prompt"]["rows"]),
                values["prompt"]["counted_input"],
                str(values["embedding"]["token"]),
                values["embedding"]["position"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise BadModel(f"{file}: not an engine description ({error!r}); export the model again") from error
        return files

    def write(self) -> None:
        """Write engine.json into the folder."""
        values = {
            "format": FORMAT,
            "weights_sha256": self.weights_sha256,
            "decoder": self.decoder.to_json(),
            "prompt": {"rows": self.base_rows, "counted_input": self.counted_input},
            "embedding": {"token": self.token_embedding, "position": self.position_embedding},
        }
        with replacing(self.path / DESCRIPTION) as temporary:
            temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

    def prompt_rows(self, inputs: EngineInputs) -> int:
        """Cache rows that the prompt of these inputs takes."""
        return self.base_rows + (inputs[self.counted_input].shape[-1] if self.counted_input else 0)


def adapter_of(path: Path) -> str:
    """Name of the adapter plugin that a folder's policy.json is for; a wrong file is that adapter's to report."""
    try:
        values = json.loads((path / "policy.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "vla"
    return str(values.get("adapter", "vla")) if isinstance(values, dict) else "vla"


def read_golden(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The arrays of golden.npz: inputs; tokens and parents of a chain and a tree; the reference's logits.

    Raises:
        BadModel: missing, cut off, or without the reference's logits.
    """
    try:
        # Opened here: NumPy leaves a file open that is no archive.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        missing = [name for name in _GOLDEN_NAMES if name not in arrays]
        if missing:
            raise ValueError(f"no {', '.join(missing)}")
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise BadModel(f"{path}: no golden inputs, or cut off ({error}); `vla-spec export` writes them") from error
    return arrays


def require_model_dir(path: Path | None) -> Path:
    """The folder, if it holds a model.

    Raises:
        BadModel: no folder, or files are missing; names them.
    """
    if path is None:
        raise BadModel("this engine needs a model folder; set `model:` in the configuration")
    missing = [name for name in ("policy.json", DESCRIPTION, WEIGHTS) if not (path / name).is_file()]
    if missing:
        raise BadModel(f"{path}: {' and '.join(missing)} missing; `vla-spec export` writes a model folder")
    return path


def hash_weights(path: Path) -> str:
    """sha256 of the weights file, hex."""
    return sha256_of(path / WEIGHTS)
