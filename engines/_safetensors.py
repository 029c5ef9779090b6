"""Where each tensor of a safetensors file lies: ONNX graphs point there, so weights exist once.

Layout of the format: uint64 length of the header, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vla_spec.errors import BadModel
from vla_spec.types import Float32

_MAX_HEADER = 100 << 20  # the format's own limit


class StoredTensor(NamedTuple):
    """One tensor: bytes ``offset .. offset + length`` of the file, dtype as safetensors calls it ("F16", "BF16")."""

    offset: int
    length: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class WeightsFile:
    """An opened index; the tensors stay on disk.

    Attributes:
        path: the file.
        tensors: name -> place.
        metadata: the header's strings.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]

    @classmethod
    def open(cls, path: Path) -> WeightsFile:
        """Read the header.

        Raises:
            BadModel: missing, truncated or no safetensors file.
        """
        try:
            size_of_file = path.stat().st_size
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                if size > min(_MAX_HEADER, size_of_file):
                    raise ValueError("its header is longer than the file")
                header = json.loads(file.read(size))
            metadata = header.pop("__metadata__", {})
            tensors = {
                name: StoredTensor(
                    8 + size + t["data_offsets"][0],
                    t["data_offsets"][1] - t["data_offsets"][0],
                    tuple(t["shape"]),
                    t["dtype"],
                )
                for name, t in header.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise BadModel(f"{path}: not a readable safetensors file ({error})") from error
        end = max((t.offset + t.length for t in tensors.values()), default=0)
        if end > size_of_file:
            raise BadModel(f"{path}: truncated, {size_of_file} bytes of {end}")
        return cls(path, tensors, metadata)

    def read(self, name: str) -> Float32:
        """One tensor in single precision.

        Raises:
            BadModel: no such tensor, or a type that is no float.
        """
        if name not in self.tensors:
            raise BadModel(f"{self.path}: no tensor {name}; has {', '.join(sorted(self.tensors)[:8])} …")
        tensor = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, tensor.length, offset=tensor.offset)
        match tensor.dtype:
            case "F16":
                values = raw.view(np.float16).astype(np.float32)
            case "BF16":
                values = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            case "F32":
                values = raw.view(np.float32)
            case other:
                raise BadModel(f"{self.path}: tensor {name} is {other}; valid: F16, BF16, F32")
        return values.reshape(tensor.shape)
