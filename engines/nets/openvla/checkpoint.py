"""Shards of a checkpoint: where every tensor lies, whether all are there, and their bytes in blocks.

Tensors are never loaded: what export does with them (rename, concatenate rows, keep some rows) are copies of byte
ranges, so memory is bounded by `BLOCK` whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vla_spec.engines._safetensors import StoredTensor, WeightsFile
from vla_spec.engines.nets.openvla.config import read_json
from vla_spec.errors import BadModel

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
BLOCK = 4 << 20
#: Names that an error message lists at most, of each kind.
MAX_NAMES = 8
#: What older libraries stored along with the weights although it follows from the configuration.
DERIVED = ("rotary_emb.inv_freq",)
FLOATS = {"BF16": 2, "F16": 2, "F32": 4}


class Piece(NamedTuple):
    """Rows of a stored tensor; ``rows`` None = all of them."""

    name: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder of shards; only headers are in memory.

    Attributes:
        folder: the checkpoint.
        places: tensor -> the shard that holds it.
    """

    folder: Path
    places: Mapping[str, WeightsFile]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the index and every shard's header.

        Raises:
            BadModel: no index, a shard that is missing or truncated, or a tensor that is not where the index says.
        """
        if not (folder / INDEX).is_file():
            if (folder / SINGLE).is_file():
                file = WeightsFile.open(folder / SINGLE)
                return cls(folder, dict.fromkeys(file.tensors, file))
            raise BadModel(f"{folder}: {INDEX} missing, and {SINGLE}; valid: a folder with one of them")
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise BadModel(f"{folder / INDEX}: no weight_map; valid: tensor names and the files that hold them")
        files = sorted({str(name) for name in index.values()})
        outside = [name for name in files if Path(name).name != name]
        if outside:
            raise BadModel(f"{folder / INDEX}: names {_some(outside)}; valid: files of the same folder")
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise BadModel(f"{folder}: {_some(missing)} missing, {INDEX} names {len(files)} files")
        shards = {name: WeightsFile.open(folder / name) for name in files}
        places = {name: shards[file] for name, file in index.items()}
        lost = [name for name, shard in places.items() if name not in shard.tensors]
        if lost:
            raise BadModel(f"{folder}: {_some(lost)} not in the files that {INDEX} names for them")
        return cls(folder, places)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names, shapes and types with what the network needs.

        Raises:
            BadModel: one error that names what is missing, unexpected, of another shape or no float.
        """
        missing = [name for name in expected if name not in self.places]
        unexpected = [name for name in self.places if name not in expected and not name.endswith(DERIVED)]
        wrong = [
            f"{name} {list(self[name].shape)} (valid: {list(shape)})"
            for name, shape in expected.items()
            if name in self.places and self[name].shape != shape
        ]
        types = [
            f"{name} {self[name].dtype}" for name in expected if name in self.places and self[name].dtype not in FLOATS
        ]
        faults = [
            f"{what} {_some(names)}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong),
                                (f"no {', '.join(FLOATS)}", types))
            if names
        ]  # fmt: skip
        if faults:
            raise BadModel(f"{self.folder}: tensors don't fit config.json: {'; '.join(faults)}")

    def __getitem__(self, name: str) -> StoredTensor:
        """Shape, type and place of a tensor."""
        return self.places[name].tensors[name]

    def rows(self, piece: Piece) -> int:
        """Rows of a piece."""
        return self[piece.name].shape[0] if piece.rows is None else piece.rows[1] - piece.rows[0]

    def blocks(self, piece: Piece) -> Iterator[memoryview]:
        """A piece's bytes, in blocks that are reused: copy what is to be kept."""
        stored = self[piece.name]
        offset, length = stored.offset, stored.length
        if piece.rows is not None:
            row = length // stored.shape[0]
            offset, length = offset + piece.rows[0] * row, (piece.rows[1] - piece.rows[0]) * row
        buffer = memoryview(bytearray(min(BLOCK, max(length, 1))))
        with self.places[piece.name].path.open("rb", buffering=0) as file:
            file.seek(offset)
            while length:
                count = file.readinto(buffer[: min(length, len(buffer))])
                if not count:
                    raise BadModel(f"{self.places[piece.name].path}: truncated inside {piece.name}")
                length -= count
                yield buffer[:count]

    def read(self, name: str) -> np.ndarray:
        """One tensor in single precision."""
        return self.places[name].read(name)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
