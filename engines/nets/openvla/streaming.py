"""One safetensors file from pieces of a checkpoint, written front to back with a few megabytes of memory."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vla_spec.atomic import replacing
from vla_spec.engines.nets.openvla.checkpoint import FLOATS, Checkpoint, Piece
from vla_spec.errors import BadModel


def write_weights(
    out: Path, checkpoint: Checkpoint, pieces: Mapping[str, list[Piece]], metadata: Mapping[str, str],
    progress: Callable[[int, int], None] | None = None,
) -> str:  # fmt: skip
    """Write ``out`` atomically; tensors keep the type that they are stored in.

    Equal arguments give equal bytes: the file's hash is the model's identity.

    Args:
        out: the file.
        checkpoint: where bytes come from.
        pieces: tensor -> what it is joined from, row by row.
        metadata: strings for the header.
        progress: called with bytes written and bytes in all, about once per tensor.

    Returns:
        sha256 of the file, hex.

    Raises:
        BadModel: pieces of one tensor in different types, or a shard that ends too early.
        OSError: the disk is full, say; nothing is left behind.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, parts in pieces.items():
        types = {checkpoint[part.name].dtype for part in parts}
        if len(types) != 1:
            raise BadModel(
                f"{checkpoint.folder}: {', '.join(part.name for part in parts)} are {' and '.join(sorted(types))}; "
                f"valid: one type, they become one tensor"
            )
        dtype = types.pop()
        shape = [sum(checkpoint.rows(part) for part in parts), *checkpoint[parts[0].name].shape[1:]]
        start, end = end, end + math.prod(shape) * FLOATS[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with replacing(out) as temporary, temporary.open("wb", buffering=0) as file:

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]

        put(struct.pack("<Q", len(text)) + text)
        for name, parts in pieces.items():
            for part in parts:
                for block in checkpoint.blocks(part):
                    put(block)
            if progress is not None:
                progress(header[name]["data_offsets"][1], end)
    return digest.hexdigest()
